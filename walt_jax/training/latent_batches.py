"""Clips that were encoded beforehand: encoding them, and batches of them, of one size or in packs of several."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
import tqdm
from jaxtyping import Float, Int

from walt_jax.data.batches import Batches
from walt_jax.data.dropping import DropConfig, drop_rate, kept_tokens
from walt_jax.data.latents import Encoded, LatentClips
from walt_jax.data.order import Order, Share
from walt_jax.data.packing import Item, Packed
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import make_pack, place_clips, row_lengths, to_tokens
from walt_jax.errors import UserError

WAITING = 256  # clips among which a pack is chosen
ENCODED_AT_ONCE = 8

Encode = Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]]
Embed = Callable[[list[str]], list[Float[np.ndarray, "n e"]]]
# What a batch has of a clip's caption, or of the empty one where it is dropped: a row of ids, or of embeddings.
ReadCaption = Callable[[Encoded, bool], Any]


def latents_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """The folder of a stage's encoded clips."""
    return workdir / "latents" / stage


def encoded_clips(
    encode: Encode, clips: Iterable[dict[str, Any]], told: tqdm.tqdm, embed: Embed | None = None
) -> Iterator[Encoded]:
    """Encodes clips in the order of their numbers.

    Args:
        encode: uint8 video [b, t, h, w, 3] to normalised latents.
        clips: {"number", "video", "text": the caption} each, of any sizes; those of one size are encoded together.
        told: is told of each.
        embed: captions to embeddings of their tokens, where they are to be kept as well.
    """
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    done: dict[int, Encoded] = {}

    def flush(alike: list[dict[str, Any]]) -> None:
        # The last ones of a size are filled up, so that one program does for all.
        video = np.stack([clip["video"] for clip in alike + alike[-1:] * (ENCODED_AT_ONCE - len(alike))])
        captions = [clip["text"] for clip in alike]
        embeddings = [None] * len(alike) if embed is None else embed(captions)
        for clip, latents, caption, each in zip(alike, np.asarray(encode(video)), captions, embeddings, strict=False):
            done[clip["number"]] = Encoded(latents, caption, each)
        told.update(len(alike))

    for clip in clips:
        alike = waiting.setdefault(clip["video"].shape, [])
        alike.append(clip)
        if len(alike) == ENCODED_AT_ONCE:
            flush(waiting.pop(clip["video"].shape))
    for alike in waiting.values():
        flush(alike)
    for number in sorted(done):
        yield done[number]


def dense_batches(
    clips: LatentClips,
    read_caption: ReadCaption,
    caption_dropout: float,
    batch_size: int,
    seed: int,
    share: Share = Share(),  # noqa: B008 (it is frozen)
) -> grain.IterDataset:
    """Endless batches of clips of one size: {"latents": [b, t, h, w, c], "text": [b, m]}, each clip once an epoch.

    Args:
        clips: see `LatentClips`.
        read_caption: see `ReadCaption`.
        caption_dropout: probability of an empty caption.
        batch_size: clips a batch.
        seed: of the order and of the dropped captions.
        share: which clips are this host's.

    Raises:
        UserError: if the clips have several sizes.
    """
    sizes = np.unique(clips.sizes, axis=0)
    if len(sizes) > 1:
        raise UserError(
            f"{clips.path} holds latents of {len(sizes)} sizes, from {_size(sizes[0])} to {_size(sizes[-1])}; give "
            "their stage shapes and a pack, or encode clips of one size."
        )

    return Batches(_Latents(clips, read_caption, caption_dropout, seed), (batch_size,), share)


@dataclasses.dataclass(frozen=True)
class _Latents:
    """Clips of one size by number, for `Batches`."""

    clips: LatentClips
    read_caption: ReadCaption
    caption_dropout: float
    seed: int

    @functools.cached_property
    def order(self) -> Order:
        return Order([len(self.clips)], [1.0], self.seed)

    def __getitem__(self, number: int) -> dict[str, Any]:
        clip = self.clips[self.order[number].index]
        dropped = np.random.default_rng([self.seed, number]).random() < self.caption_dropout
        return {"number": number, "shape": 0, "latents": clip.latents, "text": self.read_caption(clip, bool(dropped))}


def packed_batches(
    clips: LatentClips,
    read_caption: ReadCaption,
    caption_dropout: float,
    config: DenoiserConfig,
    batch_size: int,
    tokens: int,
    clips_per_pack: int,
    seed: int,
    drop: DropConfig | None = None,
    share: Share = Share(),  # noqa: B008 (it is frozen)
) -> grain.IterDataset:
    """Endless batches of packs: {"tokens": [b, n, p], "text": [b, s, m], "pack"}, each clip once an epoch.

    Args:
        clips, read_caption, caption_dropout: see `dense_batches`; the clips may have any sizes.
        config: of the denoiser.
        batch_size: packs a batch.
        tokens: of a pack.
        clips_per_pack: most of a pack.
        seed: of the order, and of what is dropped.
        drop: which of a clip's tokens are left out; none are where it isn't given.
        share: which clips are this host's.

    Raises:
        UserError: if a clip has more tokens than a pack.
    """
    kinds, owners = np.unique(clips.sizes, axis=0, return_inverse=True)
    owners = owners.reshape(-1)
    grids = [config.grid(tuple(map(int, size))) for size in kinds]
    counts = [int(np.prod(grid)) for grid in grids]
    if max(counts) > tokens:
        raise UserError(
            f"{clips.path} holds clips of {max(counts)} tokens, which overflow packs of {tokens}; raise the stage's "
            "pack.tokens."
        )
    first = clips[0]
    width = to_tokens(first.latents[None], config.patch_size).shape[-1]
    blank = jax.tree.map(np.zeros_like, read_caption(first, True))
    windows = config.attention_windows
    # As many of each size as there are in a few hundred, and one at least.
    shares = [max(1, round(256 * count / len(owners))) for count in np.bincount(owners)]
    each = place_clips([[grid] for grid, share in zip(grids, shares, strict=True) for _ in range(share)], tokens, 1)
    lengths = row_lengths(*each, windows, config.isolate_images)

    items = _Items(np.array(counts)[owners], Order([len(owners)], [1.0], seed), drop, seed)

    def arrays_of(packs: list[list[Item]]) -> dict[str, Any]:
        """A batch of these packs."""
        chosen = None
        if drop is not None:
            chosen = [[items.left(item.index, item.number) for item in pack] for pack in packs]
        placed = [[grids[owners[item.index]] for item in pack] for pack in packs]
        positions, sizes = place_clips(placed, tokens, clips_per_pack, chosen)
        batch = np.zeros((len(packs), tokens, width), np.float32)
        text = [[blank] * clips_per_pack for _ in packs]
        for row, pack in enumerate(packs):
            start = 0
            for segment, item in enumerate(pack):
                clip = clips[item.index]
                content = to_tokens(clip.latents[None], config.patch_size)[0]
                if chosen is not None:
                    content = content[chosen[row][segment]]
                batch[row, start : start + len(content)] = content
                start += len(content)
                dropped = np.random.default_rng([seed, item.number, 1]).random() < caption_dropout
                text[row][segment] = read_caption(clip, bool(dropped))
        pack = make_pack(positions, sizes, windows, lengths, config.isolate_images)
        rows = [jax.tree.map(lambda *each: np.stack(each), *row) for row in text]
        return {"tokens": batch, "text": jax.tree.map(lambda *each: np.stack(each), *rows), "pack": pack}

    return Packed(items, batch_size, tokens, clips_per_pack, WAITING, share).map(arrays_of)


@dataclasses.dataclass(frozen=True)
class _Items:
    """Clips of any size by number, for `Packed`. What is random about one is a function of the seed and its number.

    Attributes:
        counts: tokens of each clip.
        order: of the clips.
        drop: which of a clip's tokens are left out, if any.
        seed: of that.
    """

    counts: Int[np.ndarray, " n"]
    order: Order
    drop: DropConfig | None
    seed: int

    def __getitem__(self, number: int) -> Item:
        index = self.order[number].index
        return Item(index, int(self.counts[index]) if self.drop is None else len(self.left(index, number)), number)

    def left(self, index: int, number: int) -> Int[np.ndarray, " k"]:
        """The tokens of a clip that are left."""
        return kept(self.drop, int(self.counts[index]), int(self.counts.max()), [self.seed, number, 0])


def kept(drop: DropConfig, tokens: int, most: int, seed: Sequence[int]) -> Int[np.ndarray, " k"]:
    """Which tokens are left of a clip of so many, where the largest has `most`."""
    rng = np.random.default_rng(seed)
    return kept_tokens(tokens, drop_rate(drop, tokens, most, rng), rng)


def _size(size: np.ndarray) -> str:
    return " × ".join(map(str, size))
