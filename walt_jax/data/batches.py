"""Batches of clips of equal shape; an iterator's state is JSON."""

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from walt_jax.data.order import Share
from walt_jax.data.stream import Numbered, Stream

Clip = dict[str, Any]


class Batches(grain.IterDataset):
    """Endless batches of clips of equal shape, with the clips' arrays stacked.

    Clips of each shape are collected until they fill a batch. Order and randomness depend on the seed and the position
    only: an iterator restored with `set_state` continues with the same bytes.

    Args:
        clips: {"number", "shape": its index, and arrays} by number, see `pipeline.Clips`.
        batch_sizes: clips per batch, for each shape.
        share: this host's part of the order.
    """

    def __init__(self, clips: Numbered, batch_sizes: Sequence[int], share: Share = Share()):  # noqa: B008 (it is frozen)
        super().__init__()
        self.clips, self.batch_sizes, self.share = clips, tuple(batch_sizes), share

    def __iter__(self) -> "_BatchesIterator":
        return _BatchesIterator(self)


class _BatchesIterator(grain.DatasetIterator):
    def __init__(self, dataset: Batches):
        super().__init__()
        self._batch_sizes, self._stream = dataset.batch_sizes, Stream(dataset.clips, dataset.share)
        self._waiting: dict[tuple[Any, ...], list[Clip]] = {}

    def __next__(self) -> dict[str, Any]:
        while True:
            clip = next(self._stream)
            alike = self._join(clip)
            if len(alike) == self._batch_sizes[clip["shape"]]:
                del self._waiting[_kind(clip)]
                return jax.tree.map(lambda *arrays: np.stack(arrays), *map(_content, alike))

    def _join(self, clip: Clip) -> list[Clip]:
        alike = self._waiting.setdefault(_kind(clip), [])
        alike.append(clip)
        return alike

    def close(self) -> None:
        super().close()
        self._stream.close()

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state(clip["number"] for alike in self._waiting.values() for clip in alike)

    def set_state(self, state: dict[str, Any]) -> None:
        clips, self._waiting = self._stream.set_state(state), {}
        for clip in clips:
            self._join(clip)


def _content(clip: Clip) -> Clip:
    return {name: value for name, value in clip.items() if name not in ("number", "shape")}


def _kind(clip: Clip) -> tuple[Any, ...]:
    """A key that is equal for clips that can be stacked."""
    return (clip["shape"], *(np.shape(array) for array in jax.tree.leaves(_content(clip))))
