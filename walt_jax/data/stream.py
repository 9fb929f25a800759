"""A host's clips in order, prefetched; the stream's state is JSON."""

from collections.abc import Iterable
from typing import Any, Protocol

import grain

from walt_jax.data.order import Share
from walt_jax.errors import UserError

DECODE_THREADS = 2
PREFETCHED = 16  # clips
ENDLESS = 2**62


class Numbered(Protocol):
    """Clips by their number in the order, None for unusable ones. Equal numbers give equal clips."""

    def __getitem__(self, number: int) -> Any: ...


def numbered(clips: Numbered, numbers: range) -> grain.IterDataset:
    """The usable clips of some numbers of the order, prefetched."""
    return _ahead(grain.MapDataset.range(numbers.start, numbers.stop).map(lambda number: clips[int(number)]))


def stream(clips: Numbered, share: Share) -> grain.IterDataset:
    """A host's usable clips, prefetched."""
    return _ahead(grain.MapDataset.range(ENDLESS).map(lambda position: clips[share.number(int(position))]))


def _ahead(clips: grain.MapDataset) -> grain.IterDataset:
    return clips.to_iter_dataset(grain.ReadOptions(num_threads=DECODE_THREADS, prefetch_buffer_size=PREFETCHED))


class Stream:
    """A host's clips, for consumers that hold some of them back; `order.redistribute` reads its states.

    Args:
        clips: by number.
        share: this host's part of the order.
    """

    def __init__(self, clips: Numbered, share: Share):
        self._clips = clips
        self._begin(share)

    def _begin(self, share: Share) -> None:
        self._share, self._iterator = share, iter(stream(self._clips, share))

    def __next__(self) -> Any:
        return next(self._iterator)

    def close(self) -> None:
        """Stops prefetching."""
        self._iterator.close()

    def get_state(self, waiting: Iterable[int]) -> dict[str, Any]:
        """The position, and the numbers of the clips that were read and still wait."""
        return {"share": self._share.to_json(), "stream": self._iterator.get_state(), "waiting": list(waiting)}

    def set_state(self, state: dict[str, Any]) -> list[Any]:
        """Continues from a position; returns the clips that waited.

        Raises:
            UserError: if the state is of an older version.
        """
        if "share" not in state:
            raise UserError(
                "The checkpoint's position in the data is of an older version of walt_jax; go on with that version, or "
                "train in a new --workdir."
            )
        self._begin(Share.from_json(state["share"]))
        self._iterator.set_state(state["stream"])
        waiting = (self._clips[number] for number in state["waiting"])
        return [clip for clip in waiting if clip is not None]  # files may have been removed meanwhile
