"""Published weights of DiT and Latte, read from the user's files and written back.

Two layouts are recognised by their names: the original one (facebookresearch/DiT, Vchitect/Latte) and that of diffusers
(DiTTransformer2DModel, LatteTransformer3DModel). Nothing is downloaded.
"""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from einops import EinopsError, rearrange, repeat
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.sinusoids import TIME_WAVES
from walt_jax.errors import UserError

Params = dict[str, Any]
QKV = ("query", "key", "value")
Tensor = Float[np.ndarray, "..."]
# Buffers, which follow from the config.
FIXED = ("pos_embed", "temp_embed", "pos_embed.pos_embed", "temp_pos_embed")


class Entry(NamedTuple):
    """A parameter in both layouts.

    Attributes:
        ours: its path, joined by "/".
        theirs: its name.
        read: theirs to ours.
        write: ours to theirs.
        part: which third of theirs it is, where queries, keys and values are one tensor.
    """

    ours: str
    theirs: str
    read: Callable[[Tensor], Tensor] = np.asarray
    write: Callable[[Tensor], Tensor] = np.asarray
    part: int | None = None


# How the weights of a patch of one frame are extended to several, a tubelet (ViViT, Arnab et al. 2021, section 3.4):
# "central" puts them on the frame in the middle, "average" an equal share on each frame.
Tubelets = Literal["central", "average"]


def load(path: str | pathlib.Path, config: DenoiserConfig, like: Params, tubelets: Tubelets = "central") -> Params:
    """Parameters of a file.

    Args:
        path: a `.safetensors` in one of the two layouts.
        config: of the denoiser; its sizes and parts should be those of the file.
        like: parameters, or their shapes, that the file must have.
        tubelets: read if the config's patches have several frames; the output of all is that of the one frame.

    Raises:
        UserError: if the file can't be read, or its tensors are not those of the config.
    """
    tensors = _tensors(path)
    diffusers = any(name.startswith("transformer_blocks.") for name in tensors)
    _check_config(path, config, diffusers)
    entries = _entries(config, diffusers, tubelets)
    expected = {entry.theirs for entry in entries} | set(FIXED)
    if not config.embedders_per_block:
        expected |= _copies(path, tensors)
    strange = sorted(set(tensors) - expected)
    missing = sorted({entry.theirs for entry in entries} - set(tensors))
    if strange or missing:
        names = f"has {strange[0]}, which this config has no place for" if strange else f"lacks {missing[0]}"
        raise UserError(f"{path} {names}; use the config that its model has, such as configs/dit_xl_2.py.")
    shapes = {name: leaf.shape for name, leaf in _unrolled(like).items()}
    found = {}
    for entry in entries:
        tensor = tensors[entry.theirs]
        if entry.part is not None:
            tensor = np.split(tensor, 3)[entry.part]
        try:
            value = entry.read(tensor)
        except (ValueError, EinopsError):
            value = tensor
        if entry.ours not in shapes or value.shape != shapes[entry.ours]:
            wanted = shapes.get(entry.ours, "none at all")
            raise UserError(
                f"{path}: {entry.theirs} of shape {tensors[entry.theirs].shape} does not fit {entry.ours}, which is "
                f"{wanted}; use the config that its model has, such as configs/dit_xl_2.py."
            )
        found[entry.ours] = value.astype(np.float32)
    left = sorted(set(shapes) - set(found))
    if left:
        raise UserError(f"{path} has nothing for {left[0]} of this config; leave out what adds it, or another file.")
    return _rolled(config, found)


def export(params: Params, config: DenoiserConfig, diffusers: bool = True) -> dict[str, np.ndarray]:
    """Tensors by their published names; the inverse of `load`.

    Raises:
        UserError: if the config is neither DiT nor Latte.
    """
    _check_config("export", config, diffusers)
    if config.patch_size[0] > 1:
        raise UserError(f"patch_size {config.patch_size}: published layouts have patches of one frame.")
    ours, entries = _unrolled(jax.tree.map(np.asarray, params)), _entries(config, diffusers)
    left = sorted(set(ours) - {entry.ours for entry in entries})
    if left:
        raise UserError(f"{left[0]} has no place in the published layouts: this config is neither DiT nor Latte.")
    tensors: dict[str, Any] = {}
    for entry in entries:
        value = entry.write(ours[entry.ours])
        if entry.part is None:
            tensors[entry.theirs] = value
        else:
            tensors.setdefault(entry.theirs, [None] * 3)[entry.part] = value
    tensors = {name: np.concatenate(value) if isinstance(value, list) else value for name, value in tensors.items()}
    if diffusers and not config.single and not config.embedders_per_block:
        for name in [name for name in tensors if name.startswith("transformer_blocks.0.norm1.emb.")]:
            for layer in range(1, config.layers):
                tensors[name.replace(".0.", f".{layer}.", 1)] = tensors[name]
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(str(path), framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read as safetensors ({error}); convert it, or name another file.") from error


def _check_config(path: str | pathlib.Path, config: DenoiserConfig, diffusers: bool) -> None:
    if config.block not in ("dit", "latte"):
        raise UserError(
            f"{path}: published layouts are those of DiT and Latte, and block={config.block!r} is neither; choose "
            "such a config, or to export name a folder, --out=FOLDER."
        )
    closed = diffusers and not config.single
    wanted = "diffusers" if closed else "original"
    if config.time_frequencies != wanted:
        raise UserError(
            f"{path}: models of this layout have config.denoiser.time_frequencies={wanted!r}, not "
            f"{config.time_frequencies!r}; set it."
        )
    if diffusers and not config.single and len(config.windows) > 1:
        raise UserError(f"{path}: diffusers' DiT has only images; use windows=((None, None, None),).")


def _copies(path: str | pathlib.Path, tensors: dict[str, np.ndarray]) -> set[str]:
    """The embedders of time and class, of which diffusers' DiT has equal copies in each block."""
    first = "transformer_blocks.0.norm1.emb."
    copies = set()
    for name, tensor in tensors.items():
        _, found, rest = name.partition(".norm1.emb.")
        if found and not name.startswith(first):
            if not np.array_equal(tensor, tensors.get(first + rest)):
                raise UserError(
                    f"{path}: {name} differs from {first + rest}; set config.denoiser.embedders_per_block=True."
                )
            copies.add(name)
    return copies


# Layouts


def _linear(ours: str, theirs: str) -> list[Entry]:
    kernel = Entry(f"{ours}/kernel", f"{theirs}.weight", np.transpose, np.transpose)
    return [kernel, Entry(f"{ours}/bias", f"{theirs}.bias")]


def _swapped(x: Tensor, dim: int) -> Tensor:
    """(shift, scale, gate, …) to (scale, shift, gate, …), `dim` values each along the last axis; its own inverse."""
    values = np.split(x, x.shape[-1] // dim, axis=-1)
    order = [1, 0] if len(values) == 2 else [1, 0, 2, 4, 3, 5]
    return np.concatenate([values[i] for i in order], axis=-1)


def _modulation(ours: str, theirs: str, dim: int) -> list[Entry]:
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", lambda x: _swapped(x.T, dim), lambda x: _swapped(x, dim).T),
        Entry(f"{ours}/bias", f"{theirs}.bias", lambda x: _swapped(x, dim), lambda x: _swapped(x, dim)),
    ]


def _table(ours: str, theirs: str, dim: int) -> Entry:
    return Entry(
        ours, theirs, lambda x: _swapped(x.reshape(-1), dim), lambda x: _swapped(x, dim).reshape(len(x) // dim, dim)
    )


def _time_in(theirs: str, closed: bool, ours: str = "time_in") -> list[Entry]:
    """Their first step's time is 0, ours 1: cosines and sines of the one are a rotation of the other's."""
    half = TIME_WAVES // 2
    angles = 10_000.0 ** -(np.arange(half) / (half - closed))
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    turn = np.block([[cos, sin], [-sin, cos]])  # waves(x) = turn @ waves(x + 1)
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", lambda x: turn.T @ x.T, lambda x: (turn @ x).T.astype(np.float32)),
        Entry(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _entries(config: DenoiserConfig, diffusers: bool, tubelets: Tubelets = "central") -> list[Entry]:
    """All parameters of a config in a layout."""
    dim, (frames, height, width) = config.dim, config.patch_size

    def patch_in(x: Tensor) -> Tensor:
        frame = rearrange(x, "d c p q -> (p q c) d")
        if tubelets == "average":
            return np.concatenate([frame / frames] * frames)
        return np.concatenate([frame if number == frames // 2 else 0 * frame for number in range(frames)])

    def patch_out(x: Tensor) -> Tensor:
        """Of each pixel the prediction and then v, to the prediction of all pixels and then v."""
        two = 2 if config.learned_sigma else 1
        x = rearrange(x, "... (p q two c) -> ... two (p q c)", p=height, q=width, two=two)
        return repeat(x, "... two k -> ... (two t k)", t=frames)

    def patch_out_back(x: Tensor) -> Tensor:
        if not config.learned_sigma:
            return x
        return rearrange(x, "... (two p q c) -> ... (p q two c)", p=height, q=width, two=2)

    def output(name: str) -> list[Entry]:
        return [
            Entry("patch_out/kernel", f"{name}.weight", lambda x: patch_out(x.T), lambda x: patch_out_back(x).T),
            Entry("patch_out/bias", f"{name}.bias", patch_out, patch_out_back),
        ]

    def patch_in_back(x: Tensor) -> Tensor:
        return rearrange(x, "(p q c) d -> d c p q", p=height, q=width)

    patches = "pos_embed.proj" if diffusers else "x_embedder.proj"
    entries = [Entry("patch_in/kernel", f"{patches}.weight", patch_in, patch_in_back)]
    entries.append(Entry("patch_in/bias", f"{patches}.bias"))
    if not diffusers:
        entries += _time_in("t_embedder.mlp.0", closed=False) + _linear("time_out", "t_embedder.mlp.2")
        if config.classes:
            entries.append(Entry("label_embedding", "y_embedder.embedding_table.weight"))
        entries += _modulation("adaln_out", "final_layer.adaLN_modulation.1", dim) + output("final_layer.linear")
    elif config.single:
        embedder = "adaln_single.emb.timestep_embedder"
        entries += _time_in(f"{embedder}.linear_1", closed=False) + _linear("time_out", f"{embedder}.linear_2")
        entries += _modulation("adaln", "adaln_single.linear", dim)
        for number, name in enumerate(("text_in", "text_out"), 1):
            entries += _linear(name, f"caption_projection.linear_{number}")
        entries += [_table("adaln_out_table", "scale_shift_table", dim), *output("proj_out")]
    else:
        for layer in range(config.layers if config.embedders_per_block else 1):
            embedder, where = f"transformer_blocks.{layer}.norm1.emb", f"cycle{layer}/block0/" if layer else ""
            entries += _time_in(f"{embedder}.timestep_embedder.linear_1", closed=True, ours=f"{where}time_in")
            entries += _linear(f"{where}time_out", f"{embedder}.timestep_embedder.linear_2")
            if config.classes:
                table = f"{embedder}.class_embedder.embedding_table.weight"
                entries.append(Entry(f"{where}label_embedding", table))
        entries += _modulation("adaln_out", "proj_out_1", dim) + output("proj_out_2")
    for layer in range(config.layers):
        cycle, number = divmod(layer, len(config.block_windows))
        stack = "temporal_transformer_blocks" if number else "transformer_blocks"
        name = f"{stack}.{cycle}" if diffusers else f"blocks.{layer}"
        cross = config.block == "latte" and config.cross_at(config.block_windows[number])
        entries += _block(f"cycle{cycle}/block{number}", name, config, diffusers, cross)
    return entries


def _block(ours: str, theirs: str, config: DenoiserConfig, diffusers: bool, cross: bool) -> list[Entry]:
    if diffusers:
        layers = {"mlp_in": "ff.net.0.proj", "mlp_out": "ff.net.2"}
        for own, name in (("self_attention", "attn1"), ("cross_attention", "attn2"))[: 1 + cross]:
            layers |= {f"{own}/{part}": f"{name}.to_{part[0]}" for part in QKV} | {f"{own}/out": f"{name}.to_out.0"}
    else:
        layers = {"mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2", "self_attention/out": "attn.proj"}
    entries = [entry for own, name in layers.items() for entry in _linear(f"{ours}/{own}", f"{theirs}.{name}")]
    if config.single:
        return [*entries, _table(f"{ours}/adaln_table", f"{theirs}.scale_shift_table", config.dim)]
    if not diffusers:
        for part, name in enumerate(QKV):
            third = _linear(f"{ours}/self_attention/{name}", f"{theirs}.attn.qkv")
            entries += [entry._replace(part=part) for entry in third]
    name = "norm1.linear" if diffusers else "adaLN_modulation.1"
    return entries + _modulation(f"{ours}/adaln", f"{theirs}.{name}", config.dim)


# Scans


def _unrolled(params: Params) -> dict[str, Any]:
    """Arrays or shapes by their paths, with cycles by their names also where they are stacked for a scan."""
    flat = flatten_dict(params, sep="/")
    for name in [name for name in flat if name.startswith("cycles/")]:
        stack = flat.pop(name)
        for cycle in range(stack.shape[0]):
            shape = jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)
            flat[name.replace("cycles", f"cycle{cycle}", 1)] = stack[cycle] if isinstance(stack, np.ndarray) else shape
    return flat


def _rolled(config: DenoiserConfig, flat: dict[str, Any]) -> Params:
    """The inverse of `_unrolled`, of arrays."""
    for name in [name for name in flat if config.scan and name.startswith("cycle0/")]:
        count, rest = config.layers // len(config.block_windows), name.removeprefix("cycle0/")
        flat[f"cycles/{rest}"] = np.stack([flat.pop(f"cycle{cycle}/{rest}") for cycle in range(count)])
    return unflatten_dict(flat, sep="/")
