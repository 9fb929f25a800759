"""A window is the only attention pattern: spatial, temporal, spatiotemporal and full attention differ in its size."""

import math
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Array, Int, Shaped

SPARSE = 16  # so many times as many numbers as tokens are rather sorted than counted


class Window(NamedTuple):
    """Sizes in tokens; None is the whole axis. Tokens attend only to those in their own window.

    W.A.L.T alternates `Window(1, None, None)` (a frame) and `Window(None, 8, 8)` (a patch over all frames).
    """

    time: int | None
    height: int | None
    width: int | None

    @property
    def name(self) -> str:
        """Such as "1×all×all"."""
        return "×".join("all" if size is None else str(size) for size in self)

    def sizes(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The window's (time, height, width) on a grid of tokens.

        Raises:
            ValueError: if a size does not divide its axis.
        """
        sizes = tuple(length if size is None else size for size, length in zip(self, grid, strict=True))
        if any(length % size for size, length in zip(sizes, grid, strict=True)):
            raise ValueError(f"the window {tuple(self)} does not divide a latent grid of {grid} tokens")
        return sizes

    def bounds(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The largest number of tokens of a window along each axis, in clips of at most `grid`."""
        return tuple(length if size is None else min(size, length) for size, length in zip(self, grid, strict=True))


def in_windows(
    x: Shaped[Array, "b n ..."], sizes: tuple[int, int, int], grid: tuple[int, int, int]
) -> Shaped[Array, "b n ..."]:
    """The tokens of equal clips window by window, from raster order."""
    (t, h, w), (lt, lh, lw) = _counts(sizes, grid), sizes
    order = "b (t lt h lh w lw) k -> b (t h w lt lh lw) k"
    return rearrange(_merged(x), order, t=t, h=h, w=w, lt=lt, lh=lh, lw=lw).reshape(x.shape)


def in_raster(
    x: Shaped[Array, "b n ..."], sizes: tuple[int, int, int], grid: tuple[int, int, int]
) -> Shaped[Array, "b n ..."]:
    """The inverse of `in_windows`."""
    (t, h, w), (lt, lh, lw) = _counts(sizes, grid), sizes
    order = "b (t h w lt lh lw) k -> b (t lt h lh w lw) k"
    return rearrange(_merged(x), order, t=t, h=h, w=w, lt=lt, lh=lh, lw=lw).reshape(x.shape)


def _merged(x: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n k"]:
    """Heads and their features as one axis: of heads of 64 features, a TPU's memory would have 128 to move."""
    return x.reshape(*x.shape[:2], -1)


def partition(
    x: Shaped[Array, "b n ..."], sizes: tuple[int, int, int], grid: tuple[int, int, int]
) -> Shaped[Array, "bn l ..."]:
    """Groups the tokens of equal clips, in raster order, by window: windows go to the batch axis."""
    return in_windows(x, sizes, grid).reshape(-1, math.prod(sizes), *x.shape[2:])


def merge(
    x: Shaped[Array, "bn l ..."], sizes: tuple[int, int, int], grid: tuple[int, int, int]
) -> Shaped[Array, "b n ..."]:
    """The inverse of `partition`."""
    return in_raster(x.reshape(-1, math.prod(grid), *x.shape[2:]), sizes, grid)


def contiguous(sizes: tuple[int, int, int], grid: tuple[int, int, int]) -> bool:
    """Whether tokens in raster order stand window by window already, as those of frames do."""
    number = np.arange(math.prod(grid))[None]
    return np.array_equal(in_windows(number, sizes, grid), number)


def _counts(sizes: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[int, ...]:
    """How many windows there are along each axis."""
    return tuple(length // size for length, size in zip(grid, sizes, strict=True))


def window_numbers(
    positions: Int[np.ndarray, "n 4"], window: Window, isolated: Int[np.ndarray, " s"] | None = None
) -> Int[np.ndarray, " n"]:
    """The number of the window that each of a pack's tokens is in: equal numbers see each other.

    Windows start at each clip's first token; where a size does not divide an axis, the last one is smaller.

    Args:
        positions: (segment, t, y, x) of each token; padding has segment -1.
        window: see `Window`.
        isolated: segments whose tokens see only themselves, as images in W.A.L.T's spatiotemporal blocks.

    Returns:
        Numbers from 0 in the order of segments; -1 for padding.
    """
    segment, *place = positions.T
    numbers, inside = np.full(len(positions), -1, np.int32), np.flatnonzero(segment >= 0)
    if not len(inside):
        return numbers
    key = segment[inside].astype(np.int64)  # one number for segment and place in the window's grid
    apart = np.isin(key, isolated) if isolated is not None and len(isolated) else None
    for axis, size in zip(place, window, strict=True):
        if size is None and apart is None:
            continue
        axis = axis[inside]
        cell = np.zeros_like(axis) if size is None else axis // size
        if apart is not None:
            cell = np.where(apart, axis, cell)
        key = key * (int(cell.max()) + 1) + cell
    numbers[inside] = ranks(key)
    return numbers


def ranks(keys: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The place of each of these numbers from 0 on among all that occur."""
    most = int(keys.max())
    if most > SPARSE * len(keys):
        return np.unique(keys, return_inverse=True)[1]
    occurs = np.zeros(most + 1, bool)  # takes a tenth of the time of sorting
    occurs[keys] = True
    return (np.cumsum(occurs) - 1)[keys]
