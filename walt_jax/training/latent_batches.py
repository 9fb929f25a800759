"""Encodes clips, and makes batches of encoded clips; `pack_batches` makes packs."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from walt_jax.data.batches import Batches
from walt_jax.data.latents import Encoded, LatentClips
from walt_jax.data.order import WHOLE, Order, Part
from walt_jax.data.stream import Kind
from walt_jax.errors import UserError

ENCODED_AT_ONCE = 8

Encode = Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]]
Embed = Callable[[list[str]], list[Float[np.ndarray, "n e"]]]
# (clip, whether its caption is dropped) to a row of ids or embeddings, of the caption or of the empty one.
ReadCaption = Callable[[Encoded | None, bool], Any]
Size = tuple[int, int, int]


def latents_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """The folder that caches a stage's encoded clips."""
    return workdir / "latents" / stage


def encoded_clips(
    encode: Encode,
    clips: Iterable[dict[str, Any]],
    report: Callable[[int], Any],
    embed: Embed | None = None,
    low_res: Encode | None = None,
    smallest: int = ENCODED_AT_ONCE,
) -> Iterator[Encoded]:
    """Encodes clips in the order of their numbers.

    Args:
        encode: uint8 video [b, t, h, w, 3] to normalised latents.
        clips: {"number", "video", "text": the caption} each, of any sizes; clips of one size are encoded together.
        report: called after each batch with its number of clips.
        embed: captions to embeddings of their tokens, if these are stored too.
        low_res: uint8 video to latents of the same clips at low resolution, if these are stored too.
        smallest: the last batch of a size is padded to a power of two of at least this, so that few programs are
            compiled.
    """
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    done: dict[int, Encoded] = {}

    def flush(alike: list[dict[str, Any]]) -> None:
        padded = max(smallest, 2 ** math.ceil(math.log2(len(alike))))
        video = np.stack([clip["video"] for clip in alike + alike[-1:] * (padded - len(alike))])
        captions = [clip["text"] for clip in alike]
        embeddings = [None] * len(alike) if embed is None else embed(captions)
        small = [None] * len(alike) if low_res is None else low_res(video)
        for clip, *parts in zip(alike, np.asarray(encode(video)), captions, embeddings, small, strict=False):
            done[clip["number"]] = Encoded(*parts)
        report(len(alike))

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
    batch_sizes: dict[Size, int],
    seed: int,
    part: Part = WHOLE,
) -> grain.IterDataset:
    """Endless batches of clips of one size each, with each clip once an epoch.

    A batch is {"latents": [b, t, h, w, c], "text": [b, m]}; with "low_res" where the clips have low-resolution latents.

    Args:
        clips: see `LatentClips`.
        read_caption: see `ReadCaption`.
        caption_dropout: probability of an empty caption.
        batch_sizes: clips in a batch, for each size (t, h, w) of latents.
        seed: of the order and of the dropped captions.
        part: the rows of each batch that are read.

    Raises:
        UserError: if there are clips of other sizes.
    """
    sizes, owners = clip_sizes(clips)
    unknown = [size for size in sizes if size not in batch_sizes]
    if unknown:
        raise UserError(
            f"{clips.path} holds latents of {_size(unknown[0])}, but the stage's clips have "
            f"{' or '.join(map(_size, batch_sizes))}; give the stage the shapes that were encoded."
        )
    latents = _Latents(clips, owners, read_caption, caption_dropout, seed)
    return Batches(latents, [batch_sizes[size] for size in sizes], part)


def clip_sizes(clips: LatentClips) -> tuple[list[Size], Int[np.ndarray, " n"]]:
    """The distinct sizes (t, h, w) of clips' latents, and the index of each clip's."""
    sizes, owners = np.unique(clips.sizes, axis=0, return_inverse=True)
    return [tuple(map(int, size)) for size in sizes], owners.reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Latents:
    """Clips by number, for `Batches`; a clip's shape is the index of its size."""

    clips: LatentClips
    owners: Int[np.ndarray, " n"]
    read_caption: ReadCaption
    caption_dropout: float
    seed: int

    @functools.cached_property
    def order(self) -> Order:
        return Order([len(self.clips)], [1.0], self.seed)

    def kind(self, number: int) -> Kind:
        index = self.order[number].index
        return int(self.owners[index]), *self.clips.sizes[index].tolist()

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = self.order[number].index
        clip = self.clips[index]
        dropped = np.random.default_rng([self.seed, number]).random() < self.caption_dropout
        text = self.read_caption(clip, bool(dropped))
        small = {} if clip.low_res is None else {"low_res": clip.low_res}
        return {"number": number, "shape": int(self.owners[index]), "latents": clip.latents, "text": text, **small}


def _size(size: Size) -> str:
    return " × ".join(map(str, size))
