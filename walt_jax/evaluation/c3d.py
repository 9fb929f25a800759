"""C3D on UCF-101 (Tran et al. 2015), the network of the inception score of video: TGANv2's weights and preparation."""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.errors import UserError
from walt_jax.tokenizer.convolution import convolve

SIDE = 112  # pixels
FRAMES = 16
CLASSES = 101
WIDTH = 64  # channels of the first convolution; all others are multiples of it
CROP = 8  # pixels that the mean of 128 × 171 has above and left of the network's square

# Output channels of each convolution in multiples of the width, and the (time, height, width) that is pooled after it.
CONVOLUTIONS = {
    "conv1a": (1, (1, 2, 2)),
    "conv2a": (2, (2, 2, 2)),
    "conv3a": (4, None),
    "conv3b": (4, (2, 2, 2)),
    "conv4a": (8, None),
    "conv4b": (8, (2, 2, 2)),
    "conv5a": (8, None),
    "conv5b": (8, (2, 2, 2)),
}
FILES = ("conv3d_deepnetA_ucf.npz", "mean2.npz")  # of TGANv2's release

Weights = dict[str, tuple[Float[Array, "..."], ...]]


def shapes(width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name in TGANv2's files, but for the mean's height and width, which are cropped.

    Args:
        width: channels of the first convolution; tests have a smaller one.
    """
    found: dict[str, tuple[int, ...]] = {"mean": (1, 3, FRAMES, SIDE, SIDE)}
    into = 3
    for name, (factor, _) in CONVOLUTIONS.items():
        found[f"{name}/W"], found[f"{name}/b"] = (factor * width, into, 3, 3, 3), (factor * width,)
        into = factor * width
    # The last pooling rounds 7 × 7 pixels up to 4 × 4.
    for name, (inside, out) in {
        "fc6": (into * 16, 64 * width),
        "fc7": (64 * width, 64 * width),
        "fc8": (64 * width, CLASSES),
    }.items():
        found[f"{name}/W"], found[f"{name}/b"] = (out, inside), (out,)
    return found


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """TGANv2's two files of a folder; or the path, one file with the same names."""
    return [path / name for name in FILES] if path.is_dir() else [path]


def weights_from(tensors: Mapping[str, np.ndarray], path: str, width: int = WIDTH) -> Weights:
    """The layers, a kernel and a bias each, and the mean clip that is subtracted.

    Args:
        tensors: of TGANv2's files: `conv1a/W` [o, i, t, h, w], `conv1a/b`, …, `fc8/b`, and `mean` [1, 3, 16, h, w], in
            BGR and 0..255.
        path: of the file, for messages.
        width: see `shapes`.

    Raises:
        UserError: if one is missing or has another shape.
    """
    read: dict[str, np.ndarray] = {}
    for name, shape in shapes(width).items():
        if name not in tensors:
            raise UserError(
                f"The weights {path} lack {name!r}, so they are not C3D's; give TGANv2's: a folder with "
                f"{' and '.join(FILES)}."
            )
        value = tensors[name]
        if name == "mean":
            value = value[..., CROP : CROP + SIDE, CROP : CROP + SIDE]
        if value.shape != shape:
            raise UserError(f"The C3D weights {path} hold {name} of shape {list(value.shape)}, not {list(shape)}.")
        read[name] = value.astype(np.float32)
    weights: Weights = {"mean": (jnp.asarray(np.transpose(read["mean"][0], (1, 2, 3, 0))),)}
    for name in [*CONVOLUTIONS, "fc6", "fc7", "fc8"]:
        kernel = read[f"{name}/W"]
        kernel = np.transpose(kernel, (2, 3, 4, 1, 0)) if kernel.ndim == 5 else kernel.T
        weights[name] = (jnp.asarray(kernel), jnp.asarray(read[f"{name}/b"]))
    return weights


def logits(weights: Weights, clips: Float[Array, "b 16 112 112 3"]) -> Float[Array, "b 101"]:
    """Class scores before the softmax.

    Args:
        weights: see `weights_from`.
        clips: RGB in 0..255, resized.
    """
    x = clips[..., ::-1] - weights["mean"][0][None]
    for name, (_, window) in CONVOLUTIONS.items():
        kernel, bias = weights[name]
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        x = jax.nn.relu(convolve(x, kernel, (1, 1, 1)) + bias[None, None, None, None])
        if window:
            # Chainer's pooling covers all pixels: the last one has 7, and their last window reaches over the border.
            sides = [(0, -size % step) for size, step in zip(x.shape[1:4], window, strict=True)]
            pads = ((0, 0), *sides, (0, 0))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *window, 1), pads)
    x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        x = jax.nn.relu(x @ weights[name][0] + weights[name][1][None])
    return x @ weights["fc8"][0] + weights["fc8"][1][None]
