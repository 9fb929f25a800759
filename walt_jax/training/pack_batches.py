"""Batches of packs: of clips that are encoded already, or of clips that are encoded for each batch."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int

from walt_jax.data.dropping import DropConfig, drop_rate, kept_tokens
from walt_jax.data.frame_groups import frame_groups
from walt_jax.data.latents import Encoded, LatentClips
from walt_jax.data.order import WHOLE, Order, Part
from walt_jax.data.packing import Packed, PackedBatch, fill
from walt_jax.data.stream import Numbered, ReadAhead
from walt_jax.data.uniform import uniform
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Grid, Needs, PackRows, frame_tokens, make_pack, place_clips, to_tokens
from walt_jax.errors import UserError
from walt_jax.training.latent_batches import READ_AT_ONCE, ReadCaptions, Size, clip_sizes

WAITING = 256  # clips among which a pack is chosen
TRIED = 64  # data shards for which rows are chosen


@dataclasses.dataclass(frozen=True)
class Packing:
    """How clips become packs.

    Attributes:
        config: of the denoiser.
        batch_size: packs a batch.
        tokens: length of a pack.
        clips: maximum number of clips in a pack.
        seed: of the order, of dropped captions and of dropped tokens.
        caption_dropout: probability of an empty caption.
        drop: which tokens of a clip are dropped; None drops none.
        frames: how many frames of a clip are kept at most, see `data.frame_groups`; 0 keeps all.
        shards: data shards: parts of the batch that a device each computes.
        packers: how many make packs, see `Packed`.
        part: the packs of each batch that are read.
    """

    config: DenoiserConfig
    batch_size: int
    tokens: int
    clips: int
    seed: int
    caption_dropout: float = 0.0
    drop: DropConfig | None = None
    frames: int = 0
    shards: int = 1
    packers: int = 1
    part: Part = WHOLE

    def most_tokens(self, grid: Grid) -> int:
        """Of a clip of so many tokens along (t, h, w), those that are kept at most."""
        return most_kept(grid, self.frames)

    @property
    def groups(self) -> int:
        """Parts of a batch with rows of their own: one or several of a data shard, all of one packer."""
        return math.lcm(self.shards, self.packers)


class _Item(NamedTuple):
    """A clip that waits to be packed.

    Attributes:
        tokens: how many there are, without those dropped.
        number: in the order.
        grid: its tokens along (t, h, w), dropped ones included.
        needs: the rows that it takes.
    """

    tokens: int
    number: int
    grid: Grid
    needs: Needs


def packs_of_latents(
    clips: LatentClips,
    read_captions: ReadCaptions,
    packing: Packing,
) -> grain.IterDataset:
    """Endless batches of packs: {"tokens": [b, n, p], "text": [b, s, m], "pack"}, each clip once an epoch.

    Where groups of frames are kept, also "observed", [b, n, 1]: 1 at tokens of those drawn as observed.

    Args:
        clips: encoded clips of any sizes.
        read_captions: see `ReadCaptions`.
        packing: see `Packing`.

    Raises:
        UserError: if a clip has more tokens than a pack.
    """
    sizes, owners = clip_sizes(clips)
    grids = [packing.config.grid(size) for size in sizes]
    most = max(map(packing.most_tokens, grids))
    if most > packing.tokens:
        raise UserError(
            f"{clips.path} holds clips of {most} tokens, which overflow packs of {packing.tokens}; raise the stage's "
            "pack.tokens."
        )
    order = Order([len(owners)], [1.0], packing.seed)

    def grid_of(number: int) -> Grid:
        return grids[owners[order[number].index]]

    def read(some: Sequence[_Item]) -> list[Encoded]:
        return [clips[order[item.number].index] for item in some]

    channels = clips[0].latents.shape[-1]
    weights = np.bincount(owners) / len(owners)
    items = _Items(grid_of, packing, most)
    return _packs(items, read, READ_AT_ONCE, list, grids, weights, channels, read_captions, packing)


def packs_of_clips(
    clips: Numbered,
    latent_size: Callable[[tuple[int, int, int]], Size],
    sizes: dict[Size, float],
    encode: Callable[[list[dict[str, Any]]], list[Encoded]],
    channels: int,
    read_captions: ReadCaptions,
    packing: Packing,
) -> grain.IterDataset:
    """Packs as `packs_of_latents` makes them, of clips that are encoded each time.

    The clips of a batch are encoded by the thread that makes it, between steps of training. One that turns out to be
    unusable when it is read leaves its tokens as padding.

    Args:
        clips: {"number", "video", "text": the caption} by number, of the kinds (shape, frames, height, width).
        latent_size: of a video of (frames, height, width).
        sizes: (t, h, w) that latents may have, and how often; tokens of none exceed a pack's.
        encode: clips of any sizes to latents, captions and their embeddings.
        channels: of latents.
        read_captions: see `ReadCaptions`.
        packing: see `Packing`.
    """
    config = packing.config

    def grid_of(number: int) -> Grid | None:
        kind = clips.kind(number)
        return None if kind is None else config.grid(latent_size(kind[1:]))

    def one(item: _Item) -> dict[str, Any] | None:
        clip = clips[item.number]
        fits = clip is not None and config.grid(latent_size(clip["video"].shape[:3])) == item.grid
        return clip if fits else None

    def read(some: Sequence[_Item]) -> list[dict[str, Any] | None]:
        return list(map(one, some))

    grids = [config.grid(size) for size in sizes]
    most = max(map(packing.most_tokens, grids))
    weights = np.array(list(sizes.values())) / sum(sizes.values())
    return _packs(_Items(grid_of, packing, most), read, 1, encode, grids, weights, channels, read_captions, packing)


@dataclasses.dataclass(frozen=True)
class _Items:
    """Items by number, for `Packed`.

    Attributes:
        grid_of: the tokens of a clip along (t, h, w), by its number in the order; None for one that can't be used.
        packing: see `Packing`.
        most: tokens of the largest clip.
        whole: by grid, what a clip needs of rows of which all tokens are kept; filled as they come.
    """

    grid_of: Callable[[int], Grid | None]
    packing: Packing
    most: int
    whole: dict[Grid, Needs] = dataclasses.field(default_factory=dict)

    def __getitem__(self, number: int) -> _Item | None:
        grid = self.grid_of(number)
        return None if grid is None else self.item(number, grid)

    def item(self, number: int, grid: Grid) -> _Item:
        """A clip to be packed."""
        config = self.packing.config
        if self.packing.drop is None and not self.packing.frames:
            if grid not in self.whole:
                self.whole[grid] = _whole_needs(config, grid)
            return _Item(math.prod(grid), number, grid, self.whole[grid])
        kept, _ = self.kept(number, grid)
        return _Item(len(kept), number, grid, _needs(config, grid, kept))

    def kept(self, number: int, grid: Grid) -> tuple[Int[np.ndarray, " k"], Bool[np.ndarray, " k"]]:
        """Which of a clip's tokens are kept, where some are dropped, and which of those were drawn as observed."""
        packing, seed = self.packing, [self.packing.seed, number, 0]
        if packing.frames:
            groups = frame_groups(grid[0], packing.frames, np.random.default_rng(seed))
            return frame_tokens(grid, groups.frames), groups.observed.repeat(grid[1] * grid[2])
        tokens = kept(packing.drop, math.prod(grid), self.most, seed)
        return tokens, np.zeros(len(tokens), bool)


def _packs(
    items: _Items,
    read: Callable[[Sequence[_Item]], list[Any]],
    at_once: int,
    encode: Callable[[list[Any]], list[Encoded]],
    grids: Sequence[Grid],
    weights: Sequence[float],
    channels: int,
    read_captions: ReadCaptions,
    packing: Packing,
) -> grain.IterDataset:
    """Batches of packs.

    Args:
        items: see `_Items`.
        read: the clips of items; None for one that turns out to be unusable.
        at_once: clips that are read by one call, at most.
        encode: clips that were read to latents and captions.
        grids: all that clips may have.
        weights: how often each is.
        channels: of latents.
        read_captions, packing: see `packs_of_latents`.
    """
    config, tokens, part = packing.config, packing.tokens, packing.part
    width = channels * int(np.prod(config.patch_size))
    empty = jax.tree.map(np.asarray, read_captions([None], [True]))
    windows, isolate, groups = config.attention_windows, config.isolate_images, packing.groups
    rows = pack_rows(trial_shards(grids, weights, packing), grids, packing)

    def hold(clips: list[_Item]) -> bool:
        return rows.hold(Needs.sum(item.needs for item in clips))

    mine = part.rows(packing.batch_size)

    def chosen_items(packed: PackedBatch) -> list[_Item]:
        return [item for row in mine for item in packed.packs[row]]

    def join(packed: PackedBatch, found: list[Any]) -> dict[str, Any]:
        clips = encode([clip for clip in found if clip is not None])
        usable = iter(clip is not None for clip in found)
        packs = [[item for item in packed.packs[row] if next(usable)] for row in mine]
        places = [(row, segment) for row, pack in enumerate(packs) for segment in range(len(pack))]
        kept, observed = None, np.zeros((len(packs), tokens, 1), np.float32)
        if packing.drop is not None or packing.frames:
            drawn = [[items.kept(item.number, item.grid) for item in pack] for pack in packs]
            kept = [[indices for indices, _ in pack] for pack in drawn]
            for row, pack in enumerate(drawn):
                flags = np.concatenate([flags for _, flags in pack] or [np.zeros(0, bool)])
                observed[row, : len(flags), 0] = flags
        positions, sizes = place_clips([[item.grid for item in pack] for pack in packs], tokens, packing.clips, kept)
        batch, ends = np.empty((len(packs), tokens, width), np.float32), [0] * len(packs)
        for (row, segment), clip in zip(places, clips, strict=True):
            content = to_tokens(clip.latents[None], config.patch_size)[0]
            content = content if kept is None else content[kept[row][segment]]
            start, ends[row] = ends[row], ends[row] + len(content)
            batch[row, start : ends[row]] = content
        for row, end in enumerate(ends):
            batch[row, end:] = 0
        # Zeros where a pack has fewer clips; of a large T5 a clip's embeddings take a hundred times its latents.
        text = jax.tree.map(lambda leaf: np.zeros((len(packs), packing.clips, *leaf.shape[1:]), leaf.dtype), empty)
        if places:
            dropped = uniform([packing.seed], [item.number for pack in packs for item in pack], [1])
            captions = read_captions(clips, (dropped < packing.caption_dropout).tolist())
            for whole, own in zip(jax.tree.leaves(text), jax.tree.leaves(captions), strict=True):
                whole[tuple(np.transpose(places))] = own
        local = part.rows(groups)
        pack = make_pack(positions, sizes, windows, rows, isolate, len(local)).replace(
            deferred=np.array([packed.deferred[group] for group in local], np.int32)
        )
        return {"tokens": batch, "text": text, "pack": pack, **({"observed": observed} if packing.frames else {})}

    packers = sorted({row * packing.packers // packing.batch_size for row in mine})
    plan = Packed(items, packing.batch_size, tokens, packing.clips, WAITING, groups, hold, packing.packers, packers)
    return ReadAhead(plan, chosen_items, lambda _, some: read(some), join, at_once)


def trial_shards(grids: Sequence[Grid], weights: Sequence[float], packing: Packing) -> list[list[_Item]]:
    """Clips of many random data shards.

    They depend on nothing else, so that all processes of a run, and those that resume it, have the same.

    Args:
        grids: all that clips may have.
        weights: how often each is.
        packing: see `Packing`.
    """
    items = _Items(lambda number: None, packing, max(int(np.prod(grid)) for grid in grids))
    rng = np.random.default_rng(0)
    waiting, shards = [], []
    for _ in range(TRIED):
        clips = []
        for _ in range(packing.batch_size // packing.groups):
            while len(waiting) < WAITING:
                grid = grids[rng.choice(len(grids), p=weights)]
                waiting.append(items.item(int(rng.integers(2**31)), grid))
            pack, waiting = fill(waiting, packing.tokens, packing.clips)
            clips += pack
        shards.append(clips)
    return shards


def pack_rows(shards: Sequence[Sequence[_Item]], grids: Sequence[Grid], packing: Packing) -> PackRows:
    """Rows of a data shard for clips of these sizes: enough for each of these shards, and for any clip."""
    needs = [Needs.sum(clip.needs for clip in clips) for clips in shards]
    alone = itertools.chain.from_iterable(_most_needs(packing, grid) for grid in grids)
    config = packing.config
    return PackRows.choose([*needs, *alone], text=config.text_windows, text_alone=config.text_alone)


def _needs(config: DenoiserConfig, grid: Grid, kept: Int[np.ndarray, " k"]) -> Needs:
    """What a clip needs of rows, if these of its tokens are kept."""
    places = place_clips([[grid]], len(kept), 1, [[kept]])
    return Needs.of(*places, config.attention_windows, config.isolate_images)


def _whole_needs(config: DenoiserConfig, grid: Grid) -> Needs:
    """What a clip needs of rows, of which all tokens are kept."""
    return _needs(config, grid, np.arange(np.prod(grid)))


def _most_needs(packing: Packing, grid: Grid) -> Iterator[Needs]:
    """What a clip needs of rows, if as much of it is kept as can be."""
    if not 0 < packing.frames < grid[0]:
        yield _whole_needs(packing.config, grid)
        return
    for frames in (np.arange(packing.frames), np.linspace(0, grid[0] - 1, packing.frames).astype(int)):
        yield _needs(packing.config, grid, frame_tokens(grid, frames))


def most_kept(grid: Grid, frames: int) -> int:
    """Tokens of a clip of which at most so many frames are kept, or all where that is 0."""
    return min(grid[0], frames or grid[0]) * grid[1] * grid[2]


def kept(drop: DropConfig, tokens: int, most: int, seed: Sequence[int]) -> Int[np.ndarray, " k"]:
    """Which tokens are kept of a clip of so many, where the largest has `most`."""
    rng = np.random.default_rng(seed)
    return kept_tokens(tokens, drop_rate(drop, tokens, most, rng), rng)
