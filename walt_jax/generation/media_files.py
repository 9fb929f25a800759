"""Reads pictures, clips and masks, and fits them to a video's size and rate, with a note on what was changed."""

import pathlib
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from walt_jax.data import video
from walt_jax.data.video import ClipError, ClipInfo
from walt_jax.errors import UserError
from walt_jax.generation.conditions import Frames

WHITE = 128  # masks are white from here


class Reader(Protocol):
    """What reads files: the module `data.video`, or what reads in a process of its own."""

    def describe(self, path: str) -> ClipInfo:
        """See `video.describe`."""

    def read_clip(self, path: str, *args: Any, **kwargs: Any) -> Frames:
        """See `video.read_clip`."""


def read_media(
    path: str,
    height: int,
    width: int,
    fps: float,
    most: int | None = None,
    picture: bool = False,
    reader: Reader = video,
) -> tuple[Frames, list[str]]:
    """A picture or clip, scaled until it covers the size and cropped around its centre.

    Args:
        path: a file.
        height, width: of the video.
        fps: of the video; clips are resampled to it.
        most: frames to read at most; None reads all.
        picture: whether only the first frame is wanted.
        reader: see `Reader`.

    Returns:
        (frames, notes): what was changed, a sentence each.

    Raises:
        UserError: if it can't be read.
    """
    name = pathlib.Path(path).name
    try:
        info = reader.describe(path)
        still = picture or info.frames == 1
        frames = reader.read_clip(path, None if still else fps, 1 if still else most, cover=(height, width))
    except (ClipError, OSError) as error:
        raise UserError(f"{path} can't be read: {_reason(error)}; give a picture or a video.") from error
    notes = []
    if (info.height, info.width) != (height, width):
        cut = _cut(frames, height, width)
        lost = 1 - height * width / (frames.shape[1] * frames.shape[2])
        cropped = f", of which the outer {lost:.0%} are cut off" if lost > 0.005 else ""
        notes.append(f"{name} is {info.height} × {info.width}; it is scaled to {height} × {width}{cropped}")
        frames = cut
    if not still and abs(info.fps - fps) > 0.01 * fps:
        notes.append(f"{name} has {info.fps:.3g} frames a second; it is resampled to {fps:.3g}")
    if picture and info.frames > 1:
        notes.append(f"{name} is a video; its first frame is used")
    return np.ascontiguousarray(frames), notes


def read_mask(
    path: str, size: tuple[int, int, int], fps: float, reader: Reader = video
) -> tuple[Bool[np.ndarray, "#t h w"], list[str]]:
    """Where a video is to be generated: white is generated, black is kept; a picture is for all frames.

    A clip that is shorter than the video stands still at its end.

    Raises:
        UserError: if it can't be read, or has no white.
    """
    frames, height, width = size
    shown, notes = read_media(path, height, width, fps, frames, reader=reader)
    white = shown.mean(axis=-1) >= WHITE
    if not white.any():
        raise UserError(f"The mask {path} has no white, so nothing would be generated; white is what is generated.")
    if len(white) > 1:
        white = white[np.minimum(np.arange(frames), len(white) - 1)]
    return white, notes


def _cut(frames: UInt8[np.ndarray, "t h w 3"], height: int, width: int) -> UInt8[np.ndarray, "t h2 w2 3"]:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".")
