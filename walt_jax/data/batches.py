"""Batches of clips of equal shape; an iterator's state is JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from walt_jax.data.order import WHOLE, Part
from walt_jax.data.stream import Kind, Numbered, Planned, ReadAhead, check_state

Clip = dict[str, Any]


class BatchPlan(NamedTuple):
    """The clips of a batch: their kind, and their numbers in the order."""

    kind: Kind
    numbers: list[int]


class Batches(ReadAhead):
    """Endless batches of clips of equal shape, with the clips' arrays stacked.

    Clips of each shape are collected until they fill a batch. Order and randomness depend on the seed and the position
    only: an iterator restored with `set_state` continues with the same bytes. A clip that turns out to be unusable when
    it is read is replaced by the next one of its batch; a batch without any usable clip is passed over.

    Args:
        clips: {"number", "shape": its index, "video", and other arrays} by number, see `pipeline.Clips`.
        batch_sizes: clips per batch, for each shape.
        part: the rows of each batch that are read.
    """

    def __init__(self, clips: Numbered, batch_sizes: Sequence[int], part: Part = WHOLE):
        self._clips, self._part = clips, part
        super().__init__(Plans(clips, batch_sizes), self._rows, self._read, self._join)

    def _rows(self, plan: BatchPlan) -> Sequence[int]:
        return self._part.rows(len(plan.numbers))

    def _read(self, plan: BatchPlan, rows: Sequence[int]) -> list[Clip | None]:
        return [self._one(plan, row) for row in rows]

    def _one(self, plan: BatchPlan, row: int) -> Clip | None:
        for number in plan.numbers[row:] + plan.numbers[:row]:
            clip = self._clips[number]
            if clip is not None and _kind(clip) == plan.kind:
                return {name: value for name, value in clip.items() if name not in ("number", "shape")}
        return None

    def _join(self, plan: BatchPlan, clips: list[Clip | None]) -> Clip | None:
        """None if no clip of the batch is usable: then all processes have only None."""
        usable = [clip for clip in clips if clip is not None]
        if not usable:
            return None
        # A file that vanishes while the batch is read was there for some rows only.
        rows = [usable[0] if clip is None else clip for clip in clips]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


class Plans(grain.IterDataset):
    """Endless plans of batches, see `Batches`."""

    def __init__(self, clips: Planned, batch_sizes: Sequence[int]):
        super().__init__()
        self.clips, self.batch_sizes = clips, tuple(batch_sizes)

    def __iter__(self) -> "_PlansIterator":
        return _PlansIterator(self)


class _PlansIterator(grain.DatasetIterator):
    def __init__(self, plans: Plans):
        super().__init__()
        self._clips, self._batch_sizes = plans.clips, plans.batch_sizes
        self._next, self._waiting = 0, {}

    def __next__(self) -> BatchPlan:
        while True:
            number, self._next = self._next, self._next + 1
            kind = self._clips.kind(number)
            if kind is None:
                continue
            alike = self._waiting.setdefault(kind, [])
            alike.append(number)
            if len(alike) == self._batch_sizes[kind[0]]:
                return BatchPlan(kind, self._waiting.pop(kind))

    def get_state(self) -> dict[str, Any]:
        """The number that is drawn next, and those that wait for others of their kind."""
        return {"next": self._next, "waiting": [number for alike in self._waiting.values() for number in alike]}

    def set_state(self, state: dict[str, Any]) -> None:
        check_state(state, "next", "waiting")
        self._next, self._waiting = state["next"], {}
        for number in state["waiting"]:
            kind = self._clips.kind(number)
            if kind is not None:  # files may have been removed meanwhile
                self._waiting.setdefault(kind, []).append(number)


def _kind(clip: Clip) -> Kind:
    """As `Planned.kind`, of a clip that has been read."""
    return clip["shape"], *clip["video"].shape[:3]
