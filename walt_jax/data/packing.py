"""Packs: clips of any size beside each other in sequences of one length (NaViT, Dehghani et al. 2023)."""

from typing import Any, NamedTuple

import grain
import numpy as np


class Item(NamedTuple):
    """A clip to be packed: its number, how many tokens it has, and the seed of what is random about it there."""

    index: int
    tokens: int
    seed: int = 0


def fill(waiting: list[Item], tokens: int, clips: int) -> tuple[list[Item], list[Item]]:
    """One pack, and what still waits: the clip that has waited longest, and those that fill the rest best.

    Which ones is a knapsack problem, solved exactly: of `waiting` clips and so many tokens it takes their product of
    steps. Of equally full packs it is one of the fewest clips.

    Args:
        waiting: at least one clip, none of more than `tokens`, in the order of their coming.
        tokens: of a pack.
        clips: most of a pack.
    """
    first, rest = waiting[0], waiting[1:]
    room = tokens - first.tokens
    # The fewest clips that have exactly so many tokens, and for each clip where it made them fewer.
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


class Packed(grain.IterDataset):
    """Batches of packs of a data set of clips: lists of lists of `Item`.

    The position of an iterator, to be kept in a checkpoint, includes the clips that wait.

    Args:
        parent: of `Item`, endless.
        batch_size: packs a batch.
        tokens: of a pack.
        clips: most of a pack.
        buffer: clips that wait, among which the pack is chosen.
    """

    def __init__(self, parent: grain.IterDataset, batch_size: int, tokens: int, clips: int, buffer: int):
        super().__init__(parent)
        self.batch_size, self.tokens, self.clips, self.buffer = batch_size, tokens, clips, buffer

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self, iter(self._parent))


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset: Packed, parent: grain.DatasetIterator):
        super().__init__(parent)
        self._dataset = dataset
        self._waiting: list[Item] = []

    def __next__(self) -> list[list[Item]]:
        packs = []
        for _ in range(self._dataset.batch_size):
            while len(self._waiting) < self._dataset.buffer:
                self._waiting.append(Item(*next(self._parent)))
            pack, self._waiting = fill(self._waiting, self._dataset.tokens, self._dataset.clips)
            packs.append(pack)
        return packs

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "waiting": [list(item) for item in self._waiting]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._waiting = [Item(*item) for item in state["waiting"]]
