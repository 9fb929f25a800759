"""Packing: clips of any size concatenated into sequences of one length (NaViT, Dehghani et al. 2023)."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from walt_jax.data.stream import check_state


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
    sizes = [item.tokens for item in rest]
    unit = math.gcd(*sizes) or 1  # nothing is between its multiples
    room = (tokens - first.tokens) // unit
    # fewest[n]: the fewest clips with exactly n units of tokens; in 16 bits, which take half of the time.
    fewest = np.full(room + 1, clips, np.int16 if clips < 2**15 else np.int64)
    fewest[0] = 0
    tried: list[tuple[int, int, np.ndarray]] = []  # (clip, its size, of which n it is the last one added)
    alike: collections.Counter[int] = collections.Counter()
    for number, size in enumerate(sizes):
        # Of clips of one size no more can be added than there is room for: the first ones do.
        if alike[size] < min((tokens - first.tokens) // size, clips - 1):
            alike[size] += 1
            size //= unit
            with_it, without = fewest[: room + 1 - size] + 1, fewest[size:]
            tried.append((number, size, with_it < without))
            np.minimum(with_it, without, out=without)
    left = int(np.flatnonzero(fewest < clips)[-1])
    chosen = []
    for number, size, better in reversed(tried):
        if left >= size and better[left - size]:
            chosen.append(number)
            left -= size
    chosen.reverse()
    kept = set(range(len(rest))).difference(chosen)
    return [first, *(rest[number] for number in chosen)], [rest[number] for number in sorted(kept)]


class PackedBatch(NamedTuple):
    """The packs of a batch, and how many clips of each data shard went back to those that wait."""

    packs: list[list[Item]]
    deferred: list[int]


class Items(Protocol):
    """Clips that are to be packed, by their number in the order; None for unusable ones."""

    def __getitem__(self, number: int) -> Any: ...


class Packed(grain.IterDataset):
    """Endless batches of packs.

    Packers work independently, each on its own numbers of the order and with clips of its own that wait. A process
    needs only those that make its rows. The state of an iterator has the clips that wait, by packer.

    Args:
        items: by number.
        batch_size: packs per batch.
        tokens: length of a pack.
        clips: maximum number of clips in a pack.
        buffer: number of waiting clips from which a pack is chosen.
        shards: data shards, which have equal parts of the packs; a multiple of `packers`.
        hold: whether a shard can have these clips, as it can have any clip without others. While it can't, the last
            clip of the last pack goes back to those that wait.
        packers: how many there are; packer k of n reads the numbers k, k + n, k + 2n, …
        mine: indices of the packers that work here; None is all. Other packs are empty.
    """

    def __init__(
        self,
        items: Items,
        batch_size: int,
        tokens: int,
        clips: int,
        buffer: int,
        shards: int = 1,
        hold: Callable[[list[Item]], bool] = lambda clips: True,
        packers: int = 1,
        mine: Sequence[int] | None = None,
    ):
        super().__init__()
        self.items, self.shards, self.hold = items, shards, hold
        self.batch_size, self.tokens, self.clips, self.buffer = batch_size, tokens, clips, buffer
        self.packers, self.mine = packers, tuple(range(packers) if mine is None else mine)

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset: Packed):
        super().__init__()
        self._dataset, self._packers = dataset, {index: _Packer(dataset, index) for index in dataset.mine}

    def __next__(self) -> PackedBatch:
        data = self._dataset
        each, size = data.shards // data.packers, data.batch_size // data.shards
        batch = PackedBatch([], [])
        for index in range(data.packers):
            for _ in range(each):
                packs, deferred = self._packers[index].shard(size) if index in self._packers else ([[]] * size, 0)
                batch.packs.extend(packs)
                batch.deferred.append(deferred)
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"packers": {str(index): packer.get_state() for index, packer in self._packers.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        check_state(state, "packers")
        for index, packer in self._packers.items():
            packer.set_state(state["packers"][str(index)])


class _Packer:
    """Makes the packs of some data shards."""

    def __init__(self, dataset: Packed, index: int):
        self._dataset, self._index = dataset, index
        self._position = 0  # of the next clip among this packer's
        self._waiting: list[Item] = []

    def shard(self, size: int) -> tuple[list[list[Item]], int]:
        """So many packs, those of a data shard, and how many clips went back."""
        packs, deferred = [], []
        for _ in range(size):
            while len(self._waiting) < self._dataset.buffer:
                item = self._dataset.items[self._index + self._position * self._dataset.packers]
                self._position += 1
                if item is not None:
                    self._waiting.append(item)
            pack, self._waiting = fill(self._waiting, self._dataset.tokens, self._dataset.clips)
            packs.append(pack)
        while not self._dataset.hold([item for pack in packs for item in pack]):
            deferred.append(next(pack for pack in reversed(packs) if pack).pop())
        if deferred:
            self._waiting = sorted(self._waiting + deferred, key=lambda item: item.number)
        return packs, len(deferred)

    def get_state(self) -> dict[str, Any]:
        return {"next": self._position, "waiting": [item.number for item in self._waiting]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._position = state["next"]
        waiting = (self._dataset.items[number] for number in state["waiting"])
        self._waiting = [item for item in waiting if item is not None]  # files may have been removed meanwhile
