"""The global order of clips, and which rows of a batch a process reads.

Each draw has a number, counted over all epochs; its randomness is a function of the seed and this number. Which numbers
make a batch is planned from what is known without reading clips, so every process plans the same batches, and reads
only its own rows of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain

RECENT = (
    2**14
)  # draws; a batch is planned before its clips are read, and shuffling costs as much as reading a small one


class Draw(NamedTuple):
    """An entry of the global order: its number, the source, and the clip's index in that source."""

    number: int
    source: int
    index: int


class Order:
    """The global order of the clips of several sources: `order[number]`.

    Each epoch of a source has each of its clips once, in a new order; sources are interleaved by weight.

    Args:
        sizes: number of clips of each source.
        weights: of the sources, not normalised.
        seed: of the shuffling.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        sources = [
            grain.MapDataset.range(size)
            .seed(seed + number)
            .shuffle()
            .repeat()
            .map(lambda i, number=number: (number, i))
            for number, size in enumerate(sizes)
        ]
        order = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, list(weights))

        @functools.lru_cache(RECENT)
        def draw(number: int) -> Draw:
            source, index = order[number]
            return Draw(number, int(source), int(index))

        self._draw = draw

    def __getitem__(self, number: int) -> Draw:
        return self._draw(number)


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of each batch that a process reads.

    Attributes:
        shards: ascending indices of the data shards that its devices compute.
        of: number of data shards, which have equal and consecutive parts of a batch.
    """

    shards: tuple[int, ...] = (0,)
    of: int = 1

    def rows(self, count: int) -> list[int]:
        """Ascending indices of its rows of `count`."""
        each = count // self.of
        return [row for shard in self.shards for row in range(shard * each, (shard + 1) * each)]


WHOLE = Part()
