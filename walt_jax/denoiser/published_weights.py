"""Published weights of DiT and Latte, read from the user's files and written back.

Two layouts are recognised by their names: the original one (facebookresearch/DiT, Vchitect/Latte) and that of diffusers
(DiTTransformer2DModel, LatteTransformer3DModel). Nothing is downloaded.
"""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import EinopsError, rearrange, repeat
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.sinusoids import TIME_WAVES
from walt_jax.errors import UserError

Params = dict[str, Any]
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
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]
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
    entries = _entries(config, diffusers, tubelets)
    _check_config(path, config, diffusers)
    expected = {entry.theirs for entry in entries} | set(FIXED)
    if not config.embedders_per_block:
        expected |= _copies(path, tensors)
    strange = sorted(set(tensors) - expected)
    missing = sorted({entry.theirs for entry in entries} - set(tensors))
    if strange or missing:
        names = f"has {strange[0]}, which this config has no place for" if strange else f"lacks {missing[0]}"
        raise UserError(f"{path} {names}; use the config that its model has, such as configs/dit_xl_2.py.")
    shapes = {"/".join(key): leaf.shape for key, leaf in flatten_dict(_unrolled(config, like)).items()}
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
    params = unflatten_dict({tuple(name.split("/")): value for name, value in found.items()})
    return _rolled(config, params)


def export(params: Params, config: DenoiserConfig, diffusers: bool = True) -> dict[str, np.ndarray]:
    """Tensors by their published names; the inverse of `load`.

    Raises:
        UserError: if the config is neither DiT nor Latte.
    """
    _check_config("export", config, diffusers)
    params = {key: np.asarray(leaf) for key, leaf in flatten_dict(params).items()}
    unrolled = flatten_dict(_unrolled(config, unflatten_dict(params)))
    ours = {"/".join(key): leaf for key, leaf in unrolled.items()}
    if config.patch_size[0] > 1:
        raise UserError(f"patch_size {config.patch_size}: published layouts have patches of one frame.")
    entries = _entries(config, diffusers)
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
        raise UserError(f"{path}: published layouts are those of DiT and Latte, and block={config.block!r} is neither.")
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


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.T


def _linear(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{ours}/kernel", f"{theirs}.weight", _transposed, _transposed)]
    if bias:
        entries.append(Entry(f"{ours}/bias", f"{theirs}.bias", _same, _same))
    return entries


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
        Entry(f"{ours}/bias", f"{theirs}.bias", _same, _same),
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

    patches = "pos_embed.proj" if diffusers else "x_embedder.proj"
    entries = [
        Entry(
            "patch_in/kernel",
            f"{patches}.weight",
            patch_in,
            lambda x: rearrange(x, "(p q c) d -> d c p q", p=height, q=width),
        ),
        Entry("patch_in/bias", f"{patches}.bias", _same, _same),
    ]
    if not diffusers:
        entries += _time_in("t_embedder.mlp.0", closed=False) + _linear("time_out", "t_embedder.mlp.2")
        if config.classes:
            entries.append(Entry("label_embedding", "y_embedder.embedding_table.weight", _same, _same))
        entries += _modulation("adaln_out", "final_layer.adaLN_modulation.1", dim) + output("final_layer.linear")
    elif config.single:
        embedder = "adaln_single.emb.timestep_embedder"
        entries += _time_in(f"{embedder}.linear_1", closed=False) + _linear("time_out", f"{embedder}.linear_2")
        entries += _modulation("adaln", "adaln_single.linear", dim)
        entries += _linear("text_in", "caption_projection.linear_1")
        entries += _linear("text_out", "caption_projection.linear_2")
        entries += [_table("adaln_out_table", "scale_shift_table", dim), *output("proj_out")]
    else:
        for layer in range(config.layers if config.embedders_per_block else 1):
            embedder, where = f"transformer_blocks.{layer}.norm1.emb", f"cycle{layer}/block0/" if layer else ""
            entries += _time_in(f"{embedder}.timestep_embedder.linear_1", closed=True, ours=f"{where}time_in")
            entries += _linear(f"{where}time_out", f"{embedder}.timestep_embedder.linear_2")
            if config.classes:
                table = f"{embedder}.class_embedder.embedding_table.weight"
                entries.append(Entry(f"{where}label_embedding", table, _same, _same))
        entries += _modulation("adaln_out", "proj_out_1", dim) + output("proj_out_2")
    each = len(config.block_windows)
    for layer in range(config.layers):
        cycle, number = divmod(layer, each)
        name = f"blocks.{layer}"
        if diffusers:
            stack = "temporal_transformer_blocks" if number else "transformer_blocks"
            name = f"{stack}.{cycle}"
        cross = config.block == "latte" and config.cross_at(config.block_windows[number])
        entries += _block(f"cycle{cycle}/block{number}", name, config, diffusers, cross)
    return entries


def _block(ours: str, theirs: str, config: DenoiserConfig, diffusers: bool, cross: bool) -> list[Entry]:
    dim, all_biased = config.dim, config.attention_bias == "all"
    if not diffusers:
        entries = _modulation(f"{ours}/adaln", f"{theirs}.adaLN_modulation.1", dim)
        for part, name in enumerate(("query", "key", "value")):
            for entry in _linear(f"{ours}/self_attention/{name}", f"{theirs}.attn.qkv", all_biased):
                entries.append(entry._replace(part=part))
        entries += _linear(f"{ours}/self_attention/out", f"{theirs}.attn.proj", config.attention_bias != "none")
        return [
            *entries,
            *_linear(f"{ours}/mlp_in", f"{theirs}.mlp.fc1"),
            *_linear(f"{ours}/mlp_out", f"{theirs}.mlp.fc2"),
        ]

    def attention(own: str, name: str) -> list[Entry]:
        found = []
        for part in ("query", "key", "value"):
            found += _linear(f"{ours}/{own}/{part}", f"{theirs}.{name}.to_{part[0]}", all_biased)
        return found + _linear(f"{ours}/{own}/out", f"{theirs}.{name}.to_out.0", config.attention_bias != "none")

    entries = attention("self_attention", "attn1") + (attention("cross_attention", "attn2") if cross else [])
    if config.single:
        entries.append(_table(f"{ours}/adaln_table", f"{theirs}.scale_shift_table", dim))
    else:
        entries += _modulation(f"{ours}/adaln", f"{theirs}.norm1.linear", dim)
    return [
        *entries,
        *_linear(f"{ours}/mlp_in", f"{theirs}.ff.net.0.proj"),
        *_linear(f"{ours}/mlp_out", f"{theirs}.ff.net.2"),
    ]


# Scans


def _unrolled(config: DenoiserConfig, params: Params) -> Params:
    """Cycles by their names, also where they are stacked for a scan; of shapes as of arrays."""
    if not config.scan:
        return params
    flat, count = flatten_dict(params), config.layers // len(config.block_windows)
    rest = {key: leaf for key, leaf in flat.items() if key[0] != "cycles"}
    for key, leaf in flat.items():
        if key[0] == "cycles":
            for cycle in range(count):
                part = leaf[cycle] if isinstance(leaf, np.ndarray) else np.broadcast_to(np.float32(0), leaf.shape[1:])
                rest[(f"cycle{cycle}", *key[1:])] = part
    return unflatten_dict(rest)


def _rolled(config: DenoiserConfig, params: Params) -> Params:
    """The inverse of `_unrolled`, of arrays."""
    if not config.scan:
        return params
    flat, stacked = flatten_dict(params), {}
    rest = {key: leaf for key, leaf in flat.items() if not key[0].startswith("cycle")}
    for key in flat:
        if key[0] == "cycle0":
            count = config.layers // len(config.block_windows)
            stacked[("cycles", *key[1:])] = np.stack([flat[(f"cycle{cycle}", *key[1:])] for cycle in range(count)])
    return unflatten_dict(rest | stacked)
