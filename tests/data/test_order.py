"""The global order: every clip once an epoch over all hosts, also when the number of hosts changes."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walt_jax.data.order import Order, Progress, Share, redistribute

HOSTS = st.sampled_from([1, 2, 3, 8])


def take(share: Share, count: int) -> list[int]:
    return [share.number(position) for position in range(count)]


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_an_epoch_has_each_clip_once_over_all_hosts(hosts):
    order = Order([24], [1.0], seed=3)
    for epoch in range(3):
        clips = []
        for host in range(hosts):
            positions = range(epoch * 24 // hosts, (epoch + 1) * 24 // hosts)
            clips += [order[Share(host, hosts).number(position)].index for position in positions]
        assert sorted(clips) == list(range(24))


def test_epochs_and_seeds_differ_and_runs_do_not():
    first, again, other = (Order([50], [1.0], seed) for seed in (0, 0, 1))
    epochs = [[first[number].index for number in range(start, start + 50)] for start in (0, 50)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == [again[number].index for number in range(50)]
    assert epochs[0] != [other[number].index for number in range(50)]


def test_sources_are_interleaved_by_weight_and_each_has_its_own_epochs():
    order = Order([7, 11], [3.0, 1.0], seed=0)
    drawn = [order[number] for number in range(4 * 77)]
    counts = collections.Counter((draw.source, draw.index) for draw in drawn)
    assert all(counts[0, index] == 33 for index in range(7))  # 231 draws of 7 clips
    assert all(counts[1, index] == 7 for index in range(11))  # 77 of 11


@given(st.data())
def test_a_change_of_hosts_neither_loses_nor_repeats(data):
    """Hosts stop wherever they are, with clips that wait; others go on; all of it again."""
    used: list[int] = []
    shares = [Share(host, hosts) for hosts in [data.draw(HOSTS)] for host in range(hosts)]
    for _ in range(data.draw(st.integers(1, 3))):
        progress = []
        for share in shares:
            numbers = take(share, data.draw(st.integers(0, 9)))
            waiting = sorted(data.draw(st.sets(st.sampled_from(numbers)))) if numbers else []
            used += [number for number in numbers if number not in waiting]
            progress.append(Progress(share, len(numbers), waiting))
        shares = redistribute(progress, data.draw(HOSTS))

    used += [number for share in shares for number in take(share, len(share.leftovers))]
    used += [share.number(len(share.leftovers)) for share in shares]
    assert sorted(used) == list(range(len(used)))


@given(HOSTS, st.integers(0, 20))
def test_the_same_hosts_resume_unchanged(hosts, taken):
    shares = [Share(host, hosts) for host in range(hosts)]
    again = redistribute([Progress(share, taken, []) for share in shares], hosts)
    for before, after in zip(shares, again, strict=True):
        assert take(after, 5) == take(before, taken + 5)[taken:]


def test_states_that_do_not_belong_together_are_refused():
    one, other = Progress(Share(0, 2), 3, []), Progress(Share(1, 2, start=4), 3, [])
    for states in ([one], [one, one], [one, other]):
        with pytest.raises(ValueError, match="belong together"):
            redistribute(states, 2)


def test_a_share_survives_json():
    share = Share(1, 3, 12, (4, 7))
    assert Share.from_json(share.to_json()) == share
