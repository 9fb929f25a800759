"""The ways of resizing frames that published metrics differ by; on the host, in float32."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

# Where output pixel i samples the input: TensorFlow 1's `resize_bilinear` at i · in / out; pixels' centres, as PyTorch
# with align_corners=False; both corners on each other, as PyTorch with align_corners=True. None of them antialiases.
Sampling = Literal["tf1", "half_pixel", "align_corners"]
Frames = Shaped[np.ndarray, "t h w c"]


def bilinear(frames: Frames, height: int, width: int, sampling: Sampling) -> Float[np.ndarray, "t h2 w2 c"]:
    """Frames at another size, whatever their aspect ratio; values keep their range.

    Args:
        frames: any number type.
        height, width: of the result, in pixels.
        sampling: see `Sampling`.
    """
    return _along(_along(frames, height, 1, sampling), width, 2, sampling)


def _along(frames: Frames, size: int, axis: int, sampling: Sampling) -> Float[np.ndarray, "t h2 w2 c"]:
    before = frames.shape[axis]
    frames = frames.astype(np.float32)
    if before == size:
        return frames
    i = np.arange(size)
    if sampling == "tf1":
        place = i * before / size
    elif sampling == "half_pixel":
        place = np.maximum((i + 0.5) * before / size - 0.5, 0)
    else:
        place = i * (before - 1) / max(size - 1, 1)
    lower = np.minimum(np.floor(place).astype(int), before - 1)
    upper = np.minimum(lower + 1, before - 1)
    shape = [1, 1, 1, 1]
    shape[axis] = size
    weight = (place - lower).astype(np.float32).reshape(shape)
    low, high = frames.take(lower, axis), frames.take(upper, axis)
    return low + (high - low) * weight


def cover_and_crop(frames: Frames, side: int, sampling: Sampling) -> Float[np.ndarray, "t side side c"]:
    """The short side resized to `side`, the long one in proportion and rounded up; then the centre is cropped."""
    _, height, width, _ = frames.shape
    scale = side / min(height, width)
    tall, wide = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    top, left = (tall - side) // 2, (wide - side) // 2
    return bilinear(frames, tall, wide, sampling)[:, top : top + side, left : left + side]
