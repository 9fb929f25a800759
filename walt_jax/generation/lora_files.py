"""LoRA as a file: PEFT's layout, as diffusers saves it; read in kohya's too. Only safetensors; nothing is unpickled.

`transformer.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r] for each layer of the denoiser,
`text_encoder.…` of the text encoder; modules of a scan have their layer's number after its name. The header has PEFT's
config as JSON, its names with the prefix of the model: `transformer.r`, `transformer.lora_alpha`, ….
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from walt_jax.errors import UserError
from walt_jax.generation.lora import SCANNED, A, B, LoraConfig, Path, layers, merged
from walt_jax.parallel.processes import together
from walt_jax.workdir import write_atomically

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
PREFIXES = {"denoiser": "transformer", "text": "text_encoder"}  # ours and diffusers'
ENDS = {".lora_A.weight": A, ".lora_B.weight": B, ".lora_down.weight": A, ".lora_up.weight": B, ".alpha": "alpha"}
NUMBERS = ("F64", "F32", "F16", "BF16")
MOST_WEIGHT = 100.0  # a larger one is a slip of the pen
# PEFT's variants, which change layers by something else than α/r · B A
VARIANTS = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")

Place = tuple[Path, int | None]  # a layer's path, and its number where its module is scanned


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A LoRA for sampling.

    Attributes:
        file: a .safetensors, or a folder that holds `FILE`, such as the workdir of the run that trained it.
        weight: 1 is as trained; 0 changes nothing.
    """

    file: pathlib.Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Chosen":
        """Of "PATH[:WEIGHT]".

        Raises:
            UserError: if there is no such file, or the weight is not finite.
        """
        name, weight = text, 1.0
        before, colon, after = text.rpartition(":")
        if colon and before and not pathlib.Path(text).exists():
            with contextlib.suppress(ValueError):  # where it is part of the path
                name, weight = before, float(after)
        if not abs(weight) <= MOST_WEIGHT:
            raise UserError(f"--lora={text}: the weight should be a number of at most {MOST_WEIGHT:g}, such as 0.8.")
        path = pathlib.Path(name)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--lora={text}: there is no {path}; name a .safetensors, or a workdir that has a {FILE}.")
        return cls(path, weight)

    @property
    def label(self) -> str:
        """What files' tags say of it: its name, that of its folder where the file has the usual one."""
        name = self.file.absolute().parent.name if self.file.name == FILE else self.file.name
        return name if self.weight == 1 else f"{name}:{self.weight:g}"


def with_loras(params: Any, loras: Sequence[Chosen]) -> Any:
    """Parameters with the changes of all LoRAs, each times its weight, added.

    Raises:
        UserError: as `read`.
    """
    for lora in loras:
        where = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), params)
        params = together(jax.jit(merged, out_shardings=where), params, read(lora.file, params), lora.weight)
    return params


def write(path: pathlib.Path, pairs: Any, config: LoraConfig) -> None:
    """Writes A and B.

    Args:
        path: the file.
        pairs: structured as `lora.fresh` returns them, without axis names.
        config: what they were trained with.
    """
    tensors: dict[str, np.ndarray] = {}
    for (*module, kind), leaf in flatten_dict(jax.device_get(pairs)).items():
        stack = enumerate(leaf) if SCANNED in module else [(None, leaf)]
        for number, array in stack:
            end = "lora_A.weight" if kind == A else "lora_B.weight"
            tensors[f"{_name((tuple(module), number))}.{end}"] = np.ascontiguousarray(array.T)
    about: dict[str, Any] = {}
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    for prefix in PREFIXES.values():
        own = [name.removeprefix(f"{prefix}.") for name in modules if name.startswith(f"{prefix}.")]
        settings = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "target_modules": own}
        settings |= {"bias": "none", "use_dora": False, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
        about |= {f"{prefix}.{name}": value for name, value in settings.items() if own}
    header = {"format": "pt", HEADER: json.dumps(about, indent=2, sort_keys=True)}
    write_atomically(path, safetensors.numpy.save(tensors, header))


def read(path: pathlib.Path, params: Any) -> Any:
    """A and B of a file for a model; B is multiplied by α/r. Names and shapes are compared before a tensor is read.

    Args:
        path: the file, of anyone's.
        params: of the model, shapes suffice.

    Returns:
        Structured as `lora.fresh` returns them; the scale for `lora.merged` is 1.

    Raises:
        UserError: if it is no safetensors, damaged, or of another model.
    """
    kernels = layers(params)
    places = _places(kernels)
    try:
        with safe_open(path, framework="numpy") as opened:
            found = _sorted_out(path, list(opened.keys()), places)
            scales = _alphas(path, opened.metadata() or {})
            read: dict[Place, tuple[np.ndarray, np.ndarray]] = {}
            for place, names in found.items():
                rank = _checked_rank(path, names, place, kernels, opened)
                a, b = (np.asarray(opened.get_tensor(names[kind]), np.float32) for kind in (A, B))
                alpha = scales.get(place[0][0], float(rank))
                if "alpha" in names:
                    alpha = float(np.asarray(opened.get_tensor(names["alpha"]), np.float32).reshape(-1)[0])
                if not (np.isfinite(a).all() and np.isfinite(b).all() and math.isfinite(alpha)):
                    raise UserError(f"{path} has values of {_name(place)} that are not finite; take another copy.")
                read[place] = a.T, (alpha / rank) * b.T
    except (OSError, SafetensorError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path} can't be read as safetensors ({error}); take another copy of it.") from error
    return _stacked(read, kernels)


def _name(place: Place) -> str:
    (model, *module), number = place
    parts = [PREFIXES[model]]
    for part in module:
        parts += [part, str(number)] if part == SCANNED else [part]
    return ".".join(parts)


def _places(kernels: dict[Path, Any]) -> dict[str, Place]:
    """Where the layer of each name is, in all layouts: PEFT's, with two prefixes, and kohya's."""
    found: dict[str, Place] = {}
    for path, kernel in kernels.items():
        for number in range(kernel.shape[0]) if SCANNED in path else (None,):
            name = _name((path, number))
            prefix, _, rest = name.partition(".")
            names = [name, f"lora_{'unet' if prefix == 'transformer' else 'te'}_{rest.replace('.', '_')}"]
            names += [f"diffusion_model.{rest}"] if prefix == "transformer" else []
            found |= dict.fromkeys(names, (path, number))
    return found


def _sorted_out(path: pathlib.Path, names: list[str], places: dict[str, Place]) -> dict[Place, dict[str, str]]:
    """The names of each layer's A, B and α in the file.

    Raises:
        UserError: if one has no layer in the model, or A or B is missing.
    """
    found: dict[Place, dict[str, str]] = {}
    for name in names:
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            raise UserError(f"{path} has {name[:80]!r}, which is no part of a LoRA; name a file in PEFT's layout.")
        place = places.get(name.removesuffix(end))
        if place is None:
            raise UserError(f"{path} is the LoRA of another model: this one has no layer for {name[:80]!r}.")
        found.setdefault(place, {})[ENDS[end]] = name
    for place, kinds in found.items():
        if A not in kinds or B not in kinds:
            raise UserError(f"{path} lacks A or B of {_name(place)}; take another copy of it.")
    if not found:
        raise UserError(f"{path} has no LoRA in it; name a file in PEFT's layout.")
    return found


def _checked_rank(
    path: pathlib.Path, names: dict[str, str], place: Place, kernels: dict[Path, Any], opened: Any
) -> int:
    """r of a layer.

    Raises:
        UserError: if its shapes are not those of the model's layer, or no numbers.
    """
    *_, wide, high = kernels[place[0]].shape
    (a, kind_a), (b, kind_b) = (
        (tuple(part.get_shape()), part.get_dtype()) for part in (opened.get_slice(names[kind]) for kind in (A, B))
    )
    if kind_a not in NUMBERS or kind_b not in NUMBERS:
        raise UserError(f"{path} has {kind_a} and {kind_b} for {_name(place)}, which are no floating-point numbers.")
    rank = a[0] if a else 0
    if a != (rank, wide) or b != (high, rank) or not 1 <= rank <= max(wide, high):
        raise UserError(
            f"{path} is the LoRA of another model: A is {list(a)} and B {list(b)} for {_name(place)}, and this model's "
            f"layer takes [r, {wide}] and [{high}, r]."
        )
    return rank


def _alphas(path: pathlib.Path, header: dict[str, str]) -> dict[str, float]:
    """α of each model that the header states: PEFT's config, with or without the prefix of the model.

    Raises:
        UserError: if it is no JSON, or asks for one of `VARIANTS`.
    """
    if HEADER not in header:
        return {}
    try:
        about = json.loads(header[HEADER])
        found = {}
        for model, prefix in PREFIXES.items():
            for part in (prefix, None):
                own = {name: about.get(f"{part}.{name}" if part else name) for name in ("lora_alpha", *VARIANTS)}
                for variant in VARIANTS:
                    if own[variant]:
                        raise UserError(f"{path} uses {variant} of PEFT, which is not supported; train without it.")
                if own["lora_alpha"] is not None:
                    found.setdefault(model, float(own["lora_alpha"]))
        return found
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a header that can't be read ({error}); take another copy of it.") from error


def _stacked(
    found: dict[Place, tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]], kernels: dict[Path, Any]
) -> Any:
    """As a tree; what a scan has stacked is stacked, with zeros where a layer has less rank, or nothing."""
    made: dict[Path, np.ndarray] = {}
    for path in {path for path, _ in found}:
        own = {number: pair for (place, number), pair in found.items() if place == path}
        if None in own:
            made[*path, A], made[*path, B] = own[None]
            continue
        count, wide, high = kernels[path].shape
        rank = max(a.shape[1] for a, _ in own.values())
        made[*path, A] = np.zeros((count, wide, rank), np.float32)
        made[*path, B] = np.zeros((count, rank, high), np.float32)
        for number, (a, b) in own.items():
            made[*path, A][number, :, : a.shape[1]], made[*path, B][number, : b.shape[0]] = a, b
    return unflatten_dict(made)
