"""A window is the only attention pattern: spatial, temporal, spatiotemporal and full attention differ in its size."""

from typing import NamedTuple

from einops import rearrange
from jaxtyping import Array, Float


class Window(NamedTuple):
    """Sizes in tokens; None is the whole axis. Tokens attend to those in their own window only.

    W.A.L.T alternates `Window(1, None, None)` (a frame) and `Window(None, 8, 8)` (a patch over all frames).
    """

    time: int | None
    height: int | None
    width: int | None

    def sizes(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The window's (time, height, width) on a grid of tokens.

        Raises:
            ValueError: if a size does not divide its axis.
        """
        sizes = tuple(length if size is None else size for size, length in zip(self, grid, strict=True))
        if any(length % size for size, length in zip(sizes, grid, strict=True)):
            raise ValueError(f"the window {tuple(self)} does not divide a latent grid of {grid} tokens")
        return sizes


def partition(x: Float[Array, "b t h w d"], sizes: tuple[int, int, int]) -> Float[Array, "bn l d"]:
    """Groups a grid's tokens by window: windows go to the batch axis."""
    lt, lh, lw = sizes
    return rearrange(x, "b (t lt) (h lh) (w lw) d -> (b t h w) (lt lh lw) d", lt=lt, lh=lh, lw=lw)


def merge(
    x: Float[Array, "bn l d"], sizes: tuple[int, int, int], grid: tuple[int, int, int]
) -> Float[Array, "b t h w d"]:
    """The inverse of `partition`."""
    lt, lh, lw = sizes
    t, h, w = (length // size for length, size in zip(grid, sizes, strict=True))
    return rearrange(x, "(b t h w) (lt lh lw) d -> b (t lt) (h lh) (w lw) d", t=t, h=h, w=w, lt=lt, lh=lh, lw=lw)
