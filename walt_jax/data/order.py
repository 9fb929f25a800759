"""The global order of clips: one shuffled sequence for all hosts, which can be resumed on any number of hosts.

Each draw has a number, counted over all hosts and epochs; its randomness is a function of the seed and this number.
Numbers are interleaved over hosts: host h of n reads h, h + n, h + 2n, …
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import grain


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
        self._order = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, list(weights))

    def __getitem__(self, number: int) -> Draw:
        source, index = self._order[number]
        return Draw(number, int(source), int(index))


@dataclasses.dataclass(frozen=True)
class Share:
    """A host's part of the order.

    Attributes:
        host: index of this host.
        hosts: number of hosts.
        start: first number that is interleaved over these hosts.
        leftovers: numbers below `start` that this host reads first, left by another number of hosts.
    """

    host: int = 0
    hosts: int = 1
    start: int = 0
    leftovers: tuple[int, ...] = ()

    def number(self, position: int) -> int:
        """The number of the host's `position`-th draw, from 0."""
        if position < len(self.leftovers):
            return self.leftovers[position]
        return self.start + self.host + self.hosts * (position - len(self.leftovers))

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "leftovers": list(self.leftovers)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "leftovers": tuple(fields["leftovers"])})


class Progress(NamedTuple):
    """A host's position: its share, how many numbers it has read, and which of these still wait."""

    share: Share
    taken: int
    waiting: Sequence[int]


def redistribute(progress: Iterable[Progress], hosts: int) -> list[Share]:
    """Shares for another number of hosts, which together read every unused number once.

    Args:
        progress: of all previous hosts, at the same step.
        hosts: the new number of hosts.

    Raises:
        ValueError: if a previous host is missing or listed twice.
    """
    progress = list(progress)
    shares = [each.share for each in progress]
    if sorted(share.host for share in shares) != list(range(shares[0].hosts)) or len({s.start for s in shares}) > 1:
        raise ValueError(f"{len(shares)} states of {shares[0].hosts} hosts don't belong together")
    fresh = max(max(0, each.taken - len(each.share.leftovers)) for each in progress)
    start = shares[0].start + fresh * shares[0].hosts
    left: list[int] = []
    for share, taken, waiting in progress:
        left += waiting
        left += [share.number(position) for position in range(taken, len(share.leftovers) + fresh)]
    left.sort()
    return [Share(host, hosts, start, tuple(left[host::hosts])) for host in range(hosts)]
