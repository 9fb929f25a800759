"""Clips by their number in the order: read one after the other, or for batches that are planned beforehand."""

import collections
from collections.abc import Callable, Hashable, Sequence
from concurrent import futures
from typing import Any, Protocol

import grain

from walt_jax.errors import UserError

READ_THREADS = 2
PREFETCHED = 16  # clips
ENDLESS = 2**62

Kind = tuple[Hashable, ...]


class Planned(Protocol):
    """What is known of clips before they are read, by their number in the order; the same in all processes."""

    def kind(self, number: int) -> Kind | None:
        """The index of a clip's shape and its size, without reading it; None for one that is known to be unusable."""


class Numbered(Planned, Protocol):
    """Clips by their number in the order. Equal numbers give equal clips, in all processes."""

    def __getitem__(self, number: int) -> Any:
        """The clip, or None if it turns out to be unusable."""


def numbered(clips: Numbered, numbers: range = range(ENDLESS)) -> grain.IterDataset:
    """The usable clips of some numbers of the order, by default of all, prefetched."""
    read = grain.MapDataset.range(numbers.start, numbers.stop).map(lambda number: clips[int(number)])
    return read.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED))


class ReadAhead(grain.IterDataset):
    """Batches whose clips are read by threads ahead of time.

    The state of an iterator is that of the plan after the last batch that was taken.

    Args:
        plan: endless plans of batches; its iterators' states are JSON.
        clips: of a plan, what names the clips that are read.
        read: reads some clips of a plan, called in the threads; a result each.
        join: makes a batch of a plan and the results; None passes it over.
        at_once: clips that a thread reads in one call, at most; small ones take less time together.
    """

    def __init__(
        self,
        plan: grain.IterDataset,
        clips: Callable[[Any], Sequence[Any]],
        read: Callable[[Any, Sequence[Any]], list[Any]],
        join: Callable[[Any, list[Any]], Any],
        at_once: int = 1,
    ):
        super().__init__()
        self.plan, self.clips, self.read, self.join, self.at_once = plan, clips, read, join, at_once

    def __iter__(self) -> "_ReadAheadIterator":
        return _ReadAheadIterator(self)


class _ReadAheadIterator(grain.DatasetIterator):
    def __init__(self, dataset: ReadAhead):
        super().__init__()
        self._dataset, self._pool = dataset, futures.ThreadPoolExecutor(READ_THREADS)
        self._begin()

    def _begin(self, state: dict[str, Any] | None = None) -> None:
        self._plan = iter(self._dataset.plan)
        if state is not None:
            self._plan.set_state(state)
        self._state = self._plan.get_state()
        # (plan, its state after it, number of clips, results to come) of the next batches
        self._ahead: collections.deque[tuple[Any, Any, int, list[futures.Future]]] = collections.deque()

    def __next__(self) -> Any:
        while True:
            self._submit(1)
            plan, state, _, reads = self._ahead.popleft()
            self._submit(PREFETCHED)
            batch = self._dataset.join(plan, [clip for read in reads for clip in read.result()])
            self._state = state
            if batch is not None:
                return batch

    def _submit(self, clips: int) -> None:
        """Has at least so many clips of later batches read."""
        dataset = self._dataset
        while not self._ahead or sum(count for _, _, count, _ in self._ahead) < clips:
            plan = next(self._plan)
            names = dataset.clips(plan)
            parts = [names[first : first + dataset.at_once] for first in range(0, len(names), dataset.at_once)]
            reads = [self._pool.submit(dataset.read, plan, part) for part in parts]
            self._ahead.append((plan, self._plan.get_state(), len(names), reads))

    def close(self) -> None:
        """Stops reading."""
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        for *_, reads in self._ahead:
            for read in reads:
                read.cancel()
        self._begin(state)


def check_state(state: dict[str, Any], *names: str) -> None:
    """Checks that the state of a plan has these entries.

    Raises:
        UserError: if it is of an older version.
    """
    if not all(name in state for name in names):
        raise UserError(
            "The checkpoint's position in the data is of an older version of walt_jax; go on with that version, or "
            "train in a new --workdir."
        )
