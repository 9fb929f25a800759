"""The position of every token: equal clips in raster order, or packs of clips of any size."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from walt_jax.denoiser.grouping import (
    Groups,
    Rows,
    TextRows,
    choose_rows,
    choose_text_rows,
    group,
    placed,
    text_rows,
    text_rows_needed,
)
from walt_jax.denoiser.windows import Window, in_raster, in_windows, window_numbers

Grid = tuple[int, int, int]


@flax.struct.dataclass
class Pack:
    """Where a batch of packs has its clips; arrays that the host makes once a batch.

    Attributes:
        positions: (segment, t, y, x) of each token in its clip; segment -1 for padding.
        sizes: tokens of each clip along (t, y, x), zeros where a pack has fewer clips.
        groups: for attention, by the window's name.
        text: for attention to text apart from windows; None where a model has none.
        deferred: clips of each data shard that its rows had no room for; they wait for the next packs.
    """

    positions: Int[Array, "b n 4"]
    sizes: Int[Array, "b s 3"]
    groups: dict[str, Groups]
    text: TextRows | None
    deferred: Int[Array, " shards"]


@flax.struct.dataclass
class Layout:
    """Where the tokens `[b, n, …]` of a batch are.

    With `grid` each sequence is one clip of that many tokens along (t, h, w); with `pack` it is a pack of clips. Values
    of clips have shape `[b, s, …]`, s = 1 for equal clips. Equal clips' tokens are in raster order; with `order`, which
    a model uses on several devices, they stand window by window, of windows of these sizes.
    """

    grid: Grid | None = flax.struct.field(pytree_node=False, default=None)
    pack: Pack | None = None
    order: Grid | None = flax.struct.field(pytree_node=False, default=None)

    def spread(self, values: Float[Array, "b s k"]) -> Float[Array, "b n k"]:
        """Each token's value of its clip; one for all tokens, `[b, 1, k]`, where there is one clip."""
        return values if self.pack is None else _spread(values, self.pack.positions[..., 0])

    def clip_numbers(self) -> Int[Array, "b n"]:
        """Each token's clip, -1 for padding; `[1, 1]` for equal clips."""
        return jnp.zeros((1, 1), jnp.int32) if self.pack is None else self.pack.positions[..., 0]

    def belongs(self, clips: int) -> Bool[Array, "b n s"]:
        """Which tokens belong to which clip; `[1, 1, 1]` for equal clips."""
        if self.pack is None:
            return jnp.ones((1, 1, 1), bool)
        return self.pack.positions[..., :1] == jnp.arange(clips)[None, None]

    def coordinates(self) -> Int[Array, "b n 3"]:
        """(t, y, x) of each token; `[1, n, 3]` for equal clips."""
        if self.pack is None:
            return jnp.asarray(self.from_raster(raster(self.grid)[None]))
        return self.pack.positions[..., 1:]

    def from_raster(self, x: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n ..."]:
        """Equal clips' tokens in the layout's order, from raster order."""
        return x if self.order is None else in_windows(x, self.order, self.grid)

    def to_raster(self, x: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n ..."]:
        """The inverse of `from_raster`."""
        return x if self.order is None else in_raster(x, self.order, self.grid)

    def clip_sizes(self) -> Int[Array, "b s 3"]:
        """Tokens along (t, y, x) of each clip; `[1, 1, 3]` for equal clips."""
        return jnp.asarray(self.grid)[None, None] if self.pack is None else self.pack.sizes

    def valid(self) -> Bool[Array, "b n"]:
        """Which tokens are no padding; `[1, 1]` for equal clips."""
        return jnp.ones((1, 1), bool) if self.pack is None else self.pack.positions[..., 0] >= 0


@jax.custom_vjp
def _spread(values: Float[Array, "b s k"], clips: Int[Array, "b n"]) -> Float[Array, "b n k"]:
    """The row of `values` of each token's clip, zeros for clip -1.

    The gradient is a product with zeros and ones; XLA's own would be a scatter.
    """
    there = jnp.where(clips < 0, values.shape[1], clips)
    return jax.vmap(lambda rows, index: jnp.take(rows, index, axis=0, mode="fill", fill_value=0))(values, there)


def _spread_forward(values, clips):
    return _spread(values, clips), (values, clips)


def _spread_backward(residuals, gradient):
    values, clips = residuals
    belongs = (clips[..., None] == jnp.arange(values.shape[1])[None, None]).astype(gradient.dtype)
    return jnp.einsum("bns,bnk->bsk", belongs, gradient), None


_spread.defvjp(_spread_forward, _spread_backward)


@functools.lru_cache(maxsize=1024)
def raster(grid: Grid) -> Int[np.ndarray, "n 3"]:
    """(t, y, x) of a grid's tokens in raster order; an array that can't be written to."""
    places = np.ascontiguousarray(np.indices(grid, np.int32).reshape(3, -1).T)
    places.flags.writeable = False
    return places


def frame_tokens(grid: Grid, frames: Sequence[int] | Int[np.ndarray, " k"]) -> Int[np.ndarray, " n"]:
    """Indices, in raster order, of the tokens of some frames of a clip."""
    place = np.arange(grid[1] * grid[2])
    return (np.asarray(frames, np.int64)[:, None] * len(place) + place).reshape(-1)


def to_tokens(latents: Float[Array, "b t h w c"], patch: Grid) -> Float[Array, "b n p"]:
    """Patches of latent positions, in raster order."""
    pt, ph, pw = patch
    return rearrange(latents, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def from_tokens(tokens: Float[Array, "b n p"], grid: Grid, patch: Grid) -> Float[Array, "b t h w c"]:
    """The inverse of `to_tokens`, for a grid of so many tokens."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def place_clips(
    packs: Sequence[Sequence[Grid]],
    tokens: int,
    clips: int,
    kept: Sequence[Sequence[Int[np.ndarray, " k"]]] | None = None,
) -> tuple[Int[np.ndarray, "b n 4"], Int[np.ndarray, "b s 3"]]:
    """Positions and sizes of packs whose clips stand one after the other.

    Args:
        packs: of each pack, its clips' tokens along (t, y, x).
        tokens: length of a pack.
        clips: most clips of a pack.
        kept: of each clip, the indices of its tokens in raster order that are there; None keeps all.

    Raises:
        ValueError: if a pack has more tokens or clips than that.
    """
    positions = np.zeros((len(packs), tokens, 4), np.int32)
    positions[..., 0] = -1
    sizes = np.zeros((len(packs), clips, 3), np.int32)
    for row, grids in enumerate(packs):
        clip_places = [raster(grid) for grid in grids]
        if kept is not None:
            clip_places = [places[those] for places, those in zip(clip_places, kept[row], strict=True)]
        total = sum(map(len, clip_places))
        if total > tokens or len(grids) > clips:
            raise ValueError(
                f"a pack of {len(grids)} clips with {total} tokens overflows {clips} clips, {tokens} tokens"
            )
        start = 0
        for segment, (grid, places) in enumerate(zip(grids, clip_places, strict=True)):
            own = positions[row, start : start + len(places)]
            own[:, 0], own[:, 1:] = segment, places
            sizes[row, segment] = grid
            start += len(places)
    return positions, sizes


class Needs(NamedTuple):
    """What needs rows: of a clip, or of the clips of a data shard.

    Attributes:
        windows: length and clip of its windows, by the name of the model's window.
        clips: tokens of each clip.
    """

    windows: dict[str, Int[np.ndarray, "k 2"]]
    clips: Int[np.ndarray, " s"]

    @classmethod
    def of(cls, positions: np.ndarray, sizes: np.ndarray, windows: Sequence[Window], isolate_images: bool) -> Self:
        """What packs need; arguments as those of `make_pack`."""
        segments, found = positions[..., 0], {}
        through = np.where(segments < 0, -1, segments + sizes.shape[1] * np.arange(len(segments))[:, None])
        present, tokens = np.unique(through[segments >= 0], return_counts=True)
        for window in windows:
            numbers = _numbers(positions, sizes, window, isolate_images)
            packs = []
            for pack, clips in zip(numbers, through, strict=True):
                _, first, lengths = np.unique(pack[pack >= 0], return_index=True, return_counts=True)
                packs.append(np.stack([lengths, np.searchsorted(present, clips[pack >= 0][first])], axis=-1))
            found[window.name] = np.concatenate(packs)
        return cls(found, tokens)

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        """What clips need together."""
        parts = list(parts)
        offsets = np.cumsum([0, *[len(part.clips) for part in parts]])[:-1]
        windows = {
            name: np.concatenate(
                [part.windows[name] + np.array([0, offset]) for part, offset in zip(parts, offsets, strict=True)]
            )
            for name in parts[0].windows
        }
        return cls(windows, np.concatenate([part.clips for part in parts]))


class PackRows(NamedTuple):
    """The rows of a data shard: the same for all batches of a stage.

    Attributes:
        windows: by the name of the model's window, see `grouping.Groups`.
        text: (length, number) of rows for attention to text apart from windows; None where a model has none.
    """

    windows: dict[str, Rows]
    text: tuple[int, int] | None

    @classmethod
    def choose(
        cls, shards: Sequence[Needs], most: int = 2, text: Sequence[Window] = (), text_alone: bool = False
    ) -> Self:
        """Rows for data shards like these, of at most `most` lengths a window.

        Rows of the windows in `text` attend to their clips' text, too; with `text_alone` there are rows for text apart
        from windows. See `DenoiserConfig`.
        """
        names = {window.name for window in text}
        windows = {
            name: choose_rows([shard.windows[name] for shard in shards], most, name in names)
            for name in shards[0].windows
        }
        return cls(windows, choose_text_rows([shard.clips for shard in shards]) if text_alone else None)

    def hold(self, needs: Needs) -> bool:
        """Whether there are enough rows."""
        if self.text is not None:
            length, number = self.text
            if text_rows_needed(needs.clips, length) > number:
                return False
        return all(placed(windows, self.windows[name]) is not None for name, windows in needs.windows.items())


def make_pack(
    positions: Int[np.ndarray, "b n 4"],
    sizes: Int[np.ndarray, "b s 3"],
    windows: Sequence[Window],
    rows: PackRows,
    isolate_images: bool = False,
    shards: int = 1,
) -> Pack:
    """Where a batch of packs has its clips, and the groups of its windows.

    Args:
        positions, sizes: see `Pack`.
        windows: of the model, without repetition.
        rows: of each data shard.
        isolate_images: whether tokens of images see only themselves in windows that span time.
        shards: data shards, which have equal parts of the packs.

    Raises:
        ValueError: if a shard's windows or clips don't fit their rows.
    """
    segments, clips = positions[..., 0], sizes.shape[1]
    groups = {
        window.name: group(
            _numbers(positions, sizes, window, isolate_images), segments, clips, rows.windows[window.name], shards
        )
        for window in windows
    }
    text = None if rows.text is None else text_rows(segments, clips, rows.text, shards)
    return Pack(positions, sizes, groups, text, np.zeros(shards, np.int32))


def _numbers(positions: np.ndarray, sizes: np.ndarray, window: Window, isolate_images: bool) -> np.ndarray:
    isolates = isolate_images and window.time != 1
    return np.stack(
        [
            window_numbers(pack, window, np.flatnonzero(clips[:, 0] == 1) if isolates else None)
            for pack, clips in zip(positions, sizes, strict=True)
        ]
    )
