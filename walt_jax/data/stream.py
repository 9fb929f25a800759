"""A host's clips one after the other, read ahead; the place among them is a JSON."""

from collections.abc import Iterable
from typing import Any, Protocol

import grain

from walt_jax.data.order import Share
from walt_jax.errors import UserError

DECODE_THREADS = 2
PREFETCHED = 16  # clips that are read ahead
ENDLESS = 2**62


class Numbered(Protocol):
    """Clips by their number in the order; None for one that can't be used. A number gives the same clip again."""

    def __getitem__(self, number: int) -> Any: ...


def numbered(clips: Numbered, numbers: range) -> grain.IterDataset:
    """Those clips of the order, read ahead. Those that can't be used are left out."""
    return _ahead(grain.MapDataset.range(numbers.start, numbers.stop).map(lambda number: clips[int(number)]))


def stream(clips: Numbered, share: Share) -> grain.IterDataset:
    """A host's clips, read ahead. Those that can't be used are left out."""
    return _ahead(grain.MapDataset.range(ENDLESS).map(lambda position: clips[share.number(int(position))]))


def _ahead(clips: grain.MapDataset) -> grain.IterDataset:
    return clips.to_iter_dataset(grain.ReadOptions(num_threads=DECODE_THREADS, prefetch_buffer_size=PREFETCHED))


class Stream:
    """A host's clips for whoever lets some of them wait: `order.redistribute` understands its states.

    Args:
        clips: by number.
        share: which of them are this host's.
    """

    def __init__(self, clips: Numbered, share: Share):
        self._clips = clips
        self._begin(share)

    def _begin(self, share: Share) -> None:
        self._share, self._iterator = share, iter(stream(self._clips, share))

    def __next__(self) -> Any:
        return next(self._iterator)

    def close(self) -> None:
        """Reads no further ahead."""
        self._iterator.close()

    def get_state(self, waiting: Iterable[int]) -> dict[str, Any]:
        """The place, with the numbers of the clips that have come and wait."""
        return {"share": self._share.to_json(), "stream": self._iterator.get_state(), "waiting": list(waiting)}

    def set_state(self, state: dict[str, Any]) -> list[Any]:
        """Goes on from there; returns the clips that waited.

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
        return [clip for clip in waiting if clip is not None]  # a file that was there before may be gone
