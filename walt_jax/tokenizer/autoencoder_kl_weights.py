"""Published weights of `autoencoder_kl`, from a file that the user has, and back to diffusers' names.

Nothing is downloaded. The file is `vae/diffusion_pytorch_model.safetensors` of Stable Diffusion 1 or 2,
`diffusion_pytorch_model.safetensors` of stabilityai/sd-vae-ft-mse or -ema, or a `.safetensors` with the names of
latent-diffusion: only an autoencoder, or a whole model, of which the first stage is read.
"""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from walt_jax.config import Positive, build
from walt_jax.errors import UserError
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

# AutoencoderKL's parameters: nested dicts, as `model.apply({"params": …})` takes them.
Params = dict[str, Any]
Shape = tuple[int, ...]

# The first stage within latent-diffusion's whole models, and what its training saves next to it.
FIRST_STAGE = "first_stage_model."
OF_TRAINING = ("loss.", "model_ema.decay", "model_ema.num_updates")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kind of file names the parameters.

    Attributes:
        rules: regular expressions of our names, joined by dots, and what stands for them.
        coarsest_first: whether the decoder's scales are counted from the coarsest.
    """

    rules: tuple[tuple[str, str], ...]
    coarsest_first: bool

    def name(self, ours: str, scales: int) -> str:
        """The published name of "encoder.conv_in.kernel"."""
        if self.coarsest_first:
            ours = re.sub(r"^(decoder\.scale)(\d+)", lambda m: f"{m[1]}{scales - 1 - int(m[2])}", ours)
        for ours_part, theirs in (*self.rules, (r"\.(kernel|scale)$", ".weight")):
            ours = re.sub(ours_part, theirs, ours)
        return ours


_DIFFUSERS_RULES = (
    (r"^encoder\.scale(\d+)_block(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^encoder\.scale(\d+)_down", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"^decoder\.scale(\d+)_block(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"^decoder\.scale(\d+)_up", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"\.mid_block(\d)", r".mid_block.resnets.\1"),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid_attention\.norm\.", ".mid_block.attentions.0.group_norm."),
)
DIFFUSERS = Layout(
    (
        *_DIFFUSERS_RULES,
        (r"\.mid_attention\.(q|k|v)\w+", r".mid_block.attentions.0.to_\1"),
        (r"\.mid_attention\.out", ".mid_block.attentions.0.to_out.0"),
    ),
    coarsest_first=True,
)
# What diffusers wrote until 2023, sd-vae-ft-mse among it.
DIFFUSERS_OLD = Layout(
    (
        *_DIFFUSERS_RULES,
        (r"\.mid_attention\.out", ".mid_block.attentions.0.proj_attn"),
        (r"\.mid_attention\.", ".mid_block.attentions.0."),
    ),
    coarsest_first=True,
)
LATENT_DIFFUSION = Layout(
    (
        (r"^encoder\.scale(\d+)_block(\d+)", r"encoder.down.\1.block.\2"),
        (r"^encoder\.scale(\d+)_down", r"encoder.down.\1.downsample.conv"),
        (r"^decoder\.scale(\d+)_block(\d+)", r"decoder.up.\1.block.\2"),
        (r"^decoder\.scale(\d+)_up", r"decoder.up.\1.upsample.conv"),
        (r"\.mid_block0", ".mid.block_1"),
        (r"\.mid_block1", ".mid.block_2"),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.mid_attention\.(q|k|v)\w+", r".mid.attn_1.\1"),
        (r"\.mid_attention\.out", ".mid.attn_1.proj_out"),
        (r"\.mid_attention", ".mid.attn_1"),
    ),
    coarsest_first=False,
)
_ENCODER_BLOCK = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:resnets|block)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class _Stated:
    """What is read of diffusers' config.json."""

    block_out_channels: tuple[Positive, ...] | None = None
    layers_per_block: Positive | None = None
    latent_channels: Positive | None = None
    norm_num_groups: Positive | None = None
    scaling_factor: float | None = None


# Our knobs for them.
_OURS = {"block_out_channels": "block_channels", "norm_num_groups": "norm_groups"}
# What diffusers' class can be and ours is not.
_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def load_weights(
    path: str | pathlib.Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[AutoencoderKLConfig, Params]:
    """Reads an autoencoder in diffusers' names, new or old, or in latent-diffusion's; the names tell which.

    The sizes are those of the config.json next to the file. What that lacks is taken from the tensors' shapes, and what
    these don't show (norm_groups, scaling_factor) is Stable Diffusion's.

    Args:
        path: a .safetensors file; its numbers may be float16 or bfloat16.
        dtype: of the computation, for the config.

    Returns:
        The config, and the parameters as float32 numpy arrays.

    Raises:
        UserError: if the file or the config.json can't be read, or a tensor is missing, one too many or of a wrong
            shape.
    """
    path = pathlib.Path(path)
    stated = _stated(path.with_name("config.json"))
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            config, names = _match(path, shapes, stated, dtype)
            for name in names.values():
                if kinds[name] not in FLOATS:
                    raise UserError(
                        f"The autoencoder's weights {path} hold {name!r} as {kinds[name]}; "
                        f"give a file whose numbers are one of {', '.join(FLOATS)}."
                    )
            flat = {ours: _to_ours(file.get_tensor(name)) for ours, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The autoencoder's weights {path} can't be read ({error}); give the .safetensors file of an AutoencoderKL."
        ) from error
    return config, unflatten_dict(flat, sep=".")


def _to_ours(tensor: np.ndarray) -> np.ndarray:
    """[out, in, h, w] as [h, w, in, out]; of one pixel, and [out, in], as [in, out]."""
    if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        tensor = tensor.transpose(2, 3, 1, 0)
    elif tensor.ndim > 1:
        tensor = tensor.reshape(tensor.shape[:2]).T
    return np.ascontiguousarray(tensor, np.float32)


def _allowed_shapes(ours: Shape) -> tuple[Shape, ...]:
    """The shapes that a parameter can have in a file."""
    if len(ours) == 4:
        return ((ours[3], ours[2], ours[0], ours[1]),)
    if len(ours) == 2:  # linear, or a convolution of one pixel: files of different ages differ
        return (ours[::-1], (*ours[::-1], 1, 1))
    return (ours,)


def _stated(path: pathlib.Path) -> dict[str, Any]:
    """The knobs that config.json gives, by our names; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        knobs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); mend or remove it.") from error
    if not isinstance(knobs, dict):
        raise UserError(f"{path} is not a JSON object; mend or remove it.")
    for name, only in _FIXED.items():
        if knobs.get(name, only) != only:
            raise UserError(
                f"{path} has {name}={knobs[name]!r}, and only {only!r} is supported; give the weights of Stable "
                "Diffusion 1's or 2's autoencoder, in a folder of their own."
            )
    fields = [field.name for field in dataclasses.fields(_Stated)]
    stated = build(_Stated, {name: knobs[name] for name in fields if name in knobs}, str(path))
    values = {_OURS.get(name, name): getattr(stated, name) for name in fields}
    return {name: value for name, value in values.items() if value is not None}


def _match(
    path: pathlib.Path, shapes: dict[str, Shape], stated: dict[str, Any], dtype: str
) -> tuple[AutoencoderKLConfig, dict[str, str]]:
    """The config, and the file's name of each of our parameters, of a file whose tensors have these shapes.

    Raises:
        UserError: if they don't fit each other.
    """
    prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in shapes) else ""
    shapes = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(OF_TRAINING)
    }
    layout = _recognise([name.removeprefix(prefix) for name in shapes])
    if layout is None:
        raise UserError(
            f"The tensors of {path} are not named like an autoencoder's of diffusers or latent-diffusion; give the "
            ".safetensors file of an AutoencoderKL."
        )
    sizes = path.with_name("config.json")
    source, remedy = (
        (f"{sizes} asks", f"give the file that {sizes} belongs to")
        if stated
        else (
            "its other tensors ask",
            "give a complete file, or put the config.json that was published with it next to",
        )
    )

    def shape_of(name: str) -> Shape:
        if name not in shapes:
            raise UserError(f"The autoencoder's weights {path} lack {name!r}; {remedy}.")
        return shapes[name]

    def size(ours: str, scales: int) -> int:
        name = prefix + layout.name(ours, scales)
        shape = shape_of(name)
        if 0 in shape or not shape:
            raise UserError(f"The autoencoder's weights {path} hold {name!r} of shape {list(shape)}; {remedy}.")
        return shape[0]

    sizes = dict(stated)
    if not {"block_channels", "layers_per_block", "latent_channels"} <= stated.keys():
        # Counted, not the highest number: a gap is then a missing tensor and not a model of that size.
        blocks = {match.groups() for name in shapes if (match := _ENCODER_BLOCK.match(name.removeprefix(prefix)))}
        scales = max(1, len({scale for scale, _ in blocks}))
        inferred = {
            "block_channels": tuple(size(f"encoder.scale{i}_block0.conv1.kernel", scales) for i in range(scales)),
            "layers_per_block": len({block for _, block in blocks}),
            "latent_channels": size("post_quant_conv.kernel", scales),
        }
        sizes = inferred | stated
    try:
        config = AutoencoderKLConfig(**sizes, dtype=dtype)
    except ValueError as error:
        where = f"mend {sizes}" if stated else "put the config.json that was published with it next to it"
        raise UserError(f"The autoencoder's weights {path} can't be used: {error}; {where}.") from error

    wanted = _parameter_shapes(config)
    names = {ours: prefix + layout.name(ours, len(config.block_channels)) for ours in wanted}
    for ours, name in names.items():
        allowed = _allowed_shapes(wanted[ours])
        if shape_of(name) not in allowed:
            raise UserError(
                f"The autoencoder's weights {path} hold {name!r} of shape {list(shapes[name])} where {source} for "
                f"{list(allowed[0])}; {remedy}."
            )
    more = sorted(shapes.keys() - set(names.values()))
    if more:
        raise UserError(
            f"The autoencoder's weights {path} hold {more[0]!r}, which an AutoencoderKL of channels "
            f"{list(config.block_channels)} with {config.layers_per_block} layers a block doesn't have; {remedy}."
        )
    return config, names


def _recognise(names: list[str]) -> Layout | None:
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        old = any(".attentions.0.query." in name for name in names)
        return DIFFUSERS_OLD if old else DIFFUSERS
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in names):
        return LATENT_DIFFUSION
    return None


@functools.cache
def _parameter_shapes(config: AutoencoderKLConfig) -> dict[str, Shape]:
    image = jax.ShapeDtypeStruct((1, *config.strides[1:], 3), jnp.float32)
    params = nn.meta.unbox(jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)["params"])
    return {ours: leaf.shape for ours, leaf in flatten_dict(params, sep=".").items()}
