"""Packing: clips of any size concatenated into sequences of one length (NaViT, Dehghani et al. 2023)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np

from walt_jax.data.order import Share
from walt_jax.data.stream import Numbered, Stream


class Item(NamedTuple):
    """A clip to be packed: its index in its data set, its number of tokens, and its number in the order."""

    index: int
    tokens: int
    number: int = 0


def fill(waiting: list[Item], tokens: int, clips: int) -> tuple[list[Item], list[Item]]:
    """Chooses a pack: the clip that has waited longest, and the others that leave the least padding.

    The choice is a knapsack problem, solved exactly by dynamic programming in O(len(waiting) · tokens). Of equally full
    packs, one with the fewest clips is chosen.

    Args:
        waiting: at least one clip, none of more than `tokens`, oldest first.
        tokens: length of a pack.
        clips: maximum number of clips in a pack.

    Returns:
        The pack, and the clips that are left.
    """
    first, rest = waiting[0], waiting[1:]
    room = tokens - first.tokens
    # fewest[n]: the fewest clips with exactly n tokens. taken[i, n]: whether clip i is the last one added to them.
    fewest = np.full(room + 1, clips, np.int64)
    fewest[0] = 0
    taken = np.zeros((len(rest), room + 1), bool)
    for number, item in enumerate(rest):
        if item.tokens <= room:
            with_it = fewest[: room + 1 - item.tokens] + 1
            taken[number, item.tokens :] = with_it < fewest[item.tokens :]
            fewest[item.tokens :] = np.minimum(fewest[item.tokens :], with_it)
    left = int(np.flatnonzero(fewest < clips)[-1])
    chosen = []
    for number in range(len(rest) - 1, -1, -1):
        if taken[number, left]:
            chosen.append(number)
            left -= rest[number].tokens
    chosen.reverse()
    kept = set(range(len(rest))).difference(chosen)
    return [first, *(rest[number] for number in chosen)], [rest[number] for number in sorted(kept)]


class PackedBatch(NamedTuple):
    """The packs of a batch, and how many clips of each data shard went back to those that wait."""

    packs: list[list[Item]]
    deferred: list[int]


class Packed(grain.IterDataset):
    """Endless batches of packs.

    The state of an iterator includes the clips that wait.

    Args:
        items: by number.
        batch_size: packs per batch.
        tokens: length of a pack.
        clips: maximum number of clips in a pack.
        buffer: number of waiting clips from which a pack is chosen.
        share: this host's part of the order.
        shards: data shards, which have equal parts of the packs.
        hold: whether a shard can have these clips, as it can have any clip without others. While it can't, the last
            clip of the last pack goes back to those that wait.
    """

    def __init__(
        self,
        items: Numbered,
        batch_size: int,
        tokens: int,
        clips: int,
        buffer: int,
        share: Share = Share(),  # noqa: B008 (it is frozen)
        shards: int = 1,
        hold: Callable[[list[Item]], bool] = lambda clips: True,
    ):
        super().__init__()
        self.items, self.share, self.shards, self.hold = items, share, shards, hold
        self.batch_size, self.tokens, self.clips, self.buffer = batch_size, tokens, clips, buffer

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset: Packed):
        super().__init__()
        self._dataset, self._stream = dataset, Stream(dataset.items, dataset.share)
        self._waiting: list[Item] = []

    def __next__(self) -> PackedBatch:
        shards = [self._shard() for _ in range(self._dataset.shards)]
        return PackedBatch([pack for packs, _ in shards for pack in packs], [deferred for _, deferred in shards])

    def _shard(self) -> tuple[list[list[Item]], int]:
        """The packs of a data shard, and how many clips went back."""
        packs, deferred = [], []
        for _ in range(self._dataset.batch_size // self._dataset.shards):
            while len(self._waiting) < self._dataset.buffer:
                self._waiting.append(next(self._stream))
            pack, self._waiting = fill(self._waiting, self._dataset.tokens, self._dataset.clips)
            packs.append(pack)
        while not self._dataset.hold([item for pack in packs for item in pack]):
            deferred.append(next(pack for pack in reversed(packs) if pack).pop())
        if deferred:
            self._waiting = sorted(self._waiting + deferred, key=lambda item: item.number)
        return packs, len(deferred)

    def close(self) -> None:
        super().close()
        self._stream.close()

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state(item.number for item in self._waiting)

    def set_state(self, state: dict[str, Any]) -> None:
        self._waiting = self._stream.set_state(state)
