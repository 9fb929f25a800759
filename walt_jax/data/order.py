"""Which clip comes next, on every host: one shuffled order that a restart, on any number of hosts, goes on with.

Each clip that is ever read has a number, counted through all hosts and epochs; what is random about it is a function of
the seed and this number. Hosts take turns: of `hosts`, host h has the numbers h, h + hosts, h + 2 · hosts, …
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import grain


class Draw(NamedTuple):
    """A clip to be read: its number in the global order, its source, its index there."""

    number: int
    source: int
    index: int


class Order:
    """The global order of the clips of several sources: `order[number]`.

    Each source's clips come exactly once in each of its epochs, shuffled anew; sources take turns by their weights.

    Args:
        sizes: how many clips each source has.
        weights: how often each source's turn comes, over their sum.
        seed: of the order.
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
        host: this one's number, from 0.
        hosts: how many there are.
        start: the lowest number that none of them has taken.
        leftovers: numbers below it that this host is to take first.
    """

    host: int = 0
    hosts: int = 1
    start: int = 0
    leftovers: tuple[int, ...] = ()

    def number(self, position: int) -> int:
        """The number that the host takes as its `position`-th, from 0."""
        if position < len(self.leftovers):
            return self.leftovers[position]
        return self.start + self.host + self.hosts * (position - len(self.leftovers))

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "leftovers": list(self.leftovers)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "leftovers": tuple(fields["leftovers"])})


class Progress(NamedTuple):
    """How far a host has come: its share, how many numbers it has taken, and which of these it has not used yet."""

    share: Share
    taken: int
    waiting: Sequence[int]


def redistribute(progress: Iterable[Progress], hosts: int) -> list[Share]:
    """The shares of another number of hosts, which together take all that was not used, each number once.

    Args:
        progress: of all hosts that there were, at the same step.
        hosts: how many there are now.

    Raises:
        ValueError: if a host is missing or twice.
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
