"""Encodes clips, and makes batches of encoded clips; `pack_batches` makes packs."""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from walt_jax.data.batches import BatchPlan, Plans
from walt_jax.data.latents import Encoded, LatentClips
from walt_jax.data.order import WHOLE, Order, Part
from walt_jax.data.stream import Kind, ReadAhead
from walt_jax.data.uniform import uniform
from walt_jax.errors import UserError

ENCODED_AT_ONCE = 8
READ_AT_ONCE = 32  # clips, by one thread

Encode = Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]]
Embed = Callable[[list[str]], list[Float[np.ndarray, "n e"]]]
# (clips, whether the caption of each is dropped) to ids or embeddings, a row for each clip, of its caption or the empty
# one. A clip whose caption is dropped may be None.
ReadCaptions = Callable[[Sequence[Encoded | None], Sequence[bool]], Any]
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
    devices: int = 1,
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
        devices: over which `encode` divides its clips. Each gets as many as one alone would, so that latents don't
            depend on their number.
    """
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    done: dict[int, Encoded] = {}

    def flush(alike: list[dict[str, Any]]) -> None:
        padded = devices * max(smallest, 2 ** math.ceil(math.log2(-(-len(alike) // devices))))
        video = np.stack([clip["video"] for clip in alike + alike[-1:] * (padded - len(alike))])
        captions = [clip["text"] for clip in alike]
        embeddings = [None] * len(alike)
        if embed is not None:
            starts = range(0, len(captions), ENCODED_AT_ONCE)
            embeddings = [one for start in starts for one in embed(captions[start : start + ENCODED_AT_ONCE])]
        small = [None] * len(alike) if low_res is None else low_res(video)
        for clip, *parts in zip(alike, np.asarray(encode(video)), captions, embeddings, small, strict=False):
            done[clip["number"]] = Encoded(*parts)
        report(len(alike))

    for clip in clips:
        alike = waiting.setdefault(clip["video"].shape, [])
        alike.append(clip)
        if len(alike) == devices * ENCODED_AT_ONCE:
            flush(waiting.pop(clip["video"].shape))
    for alike in waiting.values():
        flush(alike)
    for number in sorted(done):
        yield done[number]


def dense_batches(
    clips: LatentClips,
    read_captions: ReadCaptions,
    caption_dropout: float,
    batch_sizes: dict[Size, int],
    seed: int,
    part: Part = WHOLE,
) -> grain.IterDataset:
    """Endless batches of clips of one size each, with each clip once an epoch.

    A batch is {"latents": [b, t, h, w, c], "text": [b, m]}; with "low_res" where the clips have low-resolution latents.

    Args:
        clips: see `LatentClips`.
        read_captions: see `ReadCaptions`.
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
    order = Order([len(clips)], [1.0], seed)

    def numbers(plan: BatchPlan) -> list[int]:
        return [plan.numbers[row] for row in part.rows(len(plan.numbers))]

    def read(_: BatchPlan, numbers: Sequence[int]) -> list[Encoded]:
        return [clips[order[number].index] for number in numbers]

    def join(plan: BatchPlan, found: list[Encoded]) -> dict[str, Any]:
        dropped = uniform([seed], numbers(plan)) < caption_dropout
        small = {} if found[0].low_res is None else {"low_res": np.stack([clip.low_res for clip in found])}
        latents = np.stack([clip.latents for clip in found])
        return {"latents": latents, "text": read_captions(found, dropped.tolist()), **small}

    plans = Plans(_Sizes(order, sizes, owners), [batch_sizes[size] for size in sizes])
    return ReadAhead(plans, numbers, read, join, READ_AT_ONCE)


def clip_sizes(clips: LatentClips) -> tuple[list[Size], Int[np.ndarray, " n"]]:
    """The distinct sizes (t, h, w) of clips' latents, and the index of each clip's."""
    sizes, owners = np.unique(clips.sizes, axis=0, return_inverse=True)
    return [tuple(map(int, size)) for size in sizes], owners.reshape(-1)


class _Sizes:
    """The kinds of clips by number, for `Plans`; a clip's shape is the index of its size."""

    def __init__(self, order: Order, sizes: Sequence[Size], owners: Int[np.ndarray, " n"]):
        self._order, self._owners = order, owners
        self._kinds = [(index, *size) for index, size in enumerate(sizes)]

    def kind(self, number: int) -> Kind:
        return self._kinds[self._owners[self._order[number].index]]


def _size(size: Size) -> str:
    return " × ".join(map(str, size))
