"""Overlapping tiles of large frames: each evaluation of the denoiser is a weighted mean over them.

So all tiles follow one noisy sample from the first step to the last (MultiDiffusion, Bar-Tal et al. 2023), and no edge
of a tile can be seen in what comes out.
"""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from walt_jax.denoiser.layout import Grid, raster

OVERLAP = 0.25  # of a tile, at least


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size that cover a grid of tokens.

    Attributes:
        grid: tokens of the whole along (t, h, w).
        size: tokens of a tile.
        unit: multiples of it are where tiles begin along height and width.
    """

    grid: Grid
    size: Grid
    unit: int = 1

    @functools.cached_property
    def starts(self) -> list[Grid]:
        """The first token of each tile."""
        units = (1, self.unit, self.unit)
        return list(itertools.product(*map(self._along, self.grid, self.size, units)))

    def _along(self, length: int, size: int, unit: int) -> list[int]:
        if length <= size:
            return [0]
        stride = max(1, int(size * (1 - OVERLAP)))
        count = 1 + math.ceil((length - size) / stride)
        places = np.linspace(0, length - size, count) / unit
        return sorted({int(place) * unit for place in places[:-1]} | {length - size})

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, "k m"]:
        """The numbers of the tokens of each tile, in raster order."""
        offsets = raster(self.size)
        return np.stack([np.ravel_multi_index((offsets + start).T, self.grid) for start in map(np.array, self.starts)])

    @functools.cached_property
    def _weights(self) -> Float[np.ndarray, " m"]:
        """Of a tile's tokens: highest in its middle, falling linearly to its edges."""
        axes = [np.minimum(np.arange(size) + 1, size - np.arange(size)) for size in self.size]
        return math.prod(np.ix_(*axes)).reshape(-1).astype(np.float32)

    def cut(self, tokens: Float[Array, "b n p"]) -> Float[Array, "k b m p"]:
        """The tokens of each tile."""
        return jnp.moveaxis(tokens[:, self._places], 1, 0)

    def cut_latents(self, latents: Float[Array, "b t h w c"], of_token: float, of_time: int) -> Float[Array, "k ..."]:
        """Latents that a token has `of_token` of along height and width, and `of_time` of along time."""
        t, h, w = self.size[0] * of_time, *(int(axis * of_token) for axis in self.size[1:])
        tiles = []
        for start in self.starts:
            first, top, left = start[0] * of_time, int(start[1] * of_token), int(start[2] * of_token)
            tiles.append(latents[:, first : first + t, top : top + h, left : left + w])
        return jnp.stack(tiles)

    def blend(self, tiles: Float[Array, "k b m p"]) -> Float[Array, "b n p"]:
        """The weighted mean of what the tiles have of each token."""
        weights = self._weights[:, None]
        total = np.zeros((math.prod(self.grid), 1), np.float32)
        np.add.at(total, self._places, weights[None])
        batch, width = tiles.shape[1], tiles.shape[3]
        found = jnp.zeros((batch, math.prod(self.grid), width), tiles.dtype)
        for number in range(len(self.starts)):
            found = found.at[:, self._places[number]].add(weights[None] * tiles[number])
        return found / total[None]
