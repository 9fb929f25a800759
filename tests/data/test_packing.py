"""Packs have each clip once an epoch, never overflow, starve no clip, waste little, and can be resumed."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.order import Order
from walt_jax.data.packing import Item, Packed, fill

TOKENS, CLIPS = 20, 4
SIZES = st.lists(st.integers(1, TOKENS), min_size=1, max_size=30)


class Items:
    """Endless epochs of clips of these sizes, shuffled where there is a seed."""

    def __init__(self, sizes, seed=None):
        self.sizes, self.order = sizes, None if seed is None else Order([len(sizes)], [1.0], seed)

    def __getitem__(self, number):
        index = number % len(self.sizes) if self.order is None else self.order[number].index
        return Item(index, int(self.sizes[index]), number)


def packed(sizes, batch_size=2, tokens=TOKENS, clips=CLIPS, buffer=8, seed=None):
    return Packed(Items(sizes, seed), batch_size, tokens, clips, buffer)


def waiting(iterator):
    """Of all packers."""
    return [number for packer in iterator.get_state()["packers"].values() for number in packer["waiting"]]


def taken(dataset, count):
    return [batch.packs for batch in itertools.islice(iter(dataset), count)]


def clips_of(batches):
    return [item for batch in batches for pack in batch for item in pack]


def waiting_list(sizes):
    return [Item(index, size) for index, size in enumerate(sizes)]


FEW = st.lists(st.integers(1, TOKENS), min_size=1, max_size=11)


def fullest(waiting, tokens, clips):
    """Tries every pack with the oldest clip: (the most tokens, the fewest clips that have them)."""
    packs = itertools.chain.from_iterable(itertools.combinations(waiting[1:], count) for count in range(clips))
    totals = ((waiting[0].tokens + sum(item.tokens for item in pack), -1 - len(pack)) for pack in packs)
    total, count = max(total for total in totals if total[0] <= tokens)
    return total, -count


@settings(max_examples=150, deadline=None)
@given(FEW, st.integers(1, 6))
def test_no_other_choice_fills_a_pack_more(sizes, clips):
    waiting = waiting_list(sizes)
    pack, _ = fill(waiting, TOKENS, clips)
    assert (sum(item.tokens for item in pack), len(pack)) == fullest(waiting, TOKENS, clips)
    assert waiting == waiting_list(sizes)  # left as it was


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 6))
def test_a_pack_is_of_those_that_wait_overflows_nothing_and_has_no_room_for_another(sizes, clips):
    waiting = waiting_list(sizes)
    pack, rest = fill(waiting, TOKENS, clips)
    total = sum(item.tokens for item in pack)
    assert sorted(pack + rest) == waiting
    assert rest == sorted(rest)  # still in the order of their coming
    assert pack[0] == waiting[0]
    assert total <= TOKENS
    assert len(pack) <= clips
    assert len(pack) == clips or all(item.tokens > TOKENS - total for item in rest)


def table(waiting, tokens, clips):
    """The knapsack's whole table, one clip and one length at a time; of equal packs the one that was found first."""
    first, rest, room = waiting[0], waiting[1:], tokens - waiting[0].tokens
    best = {0: ()}  # by length
    for number, item in enumerate(rest):
        for length in range(room, item.tokens - 1, -1):
            before = best.get(length - item.tokens)
            if before is not None and len(before) + 1 < min(clips, len(best.get(length, range(clips)))):
                best[length] = (*before, number)
    chosen = best[max(best)]
    left = [item for number, item in enumerate(rest) if number not in chosen]
    return [first, *(rest[number] for number in chosen)], left


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 6), st.integers(1, 3))
def test_of_packs_as_full_and_of_as_few_clips_that_of_the_table_is_chosen(sizes, clips, unit):
    waiting = waiting_list([unit * size for size in sizes])
    assert fill(waiting, unit * TOKENS + unit - 1, clips) == table(waiting, unit * TOKENS + unit - 1, clips)


def test_by_hand():
    pack, rest = fill([Item(7, 5), Item(1, 9), Item(2, 8), Item(3, 9), Item(4, 7)], 20, 3)
    assert pack == [Item(7, 5), Item(2, 8), Item(4, 7)]
    assert rest == [Item(1, 9), Item(3, 9)]


def test_two_equal_clips_are_not_taken_for_one():
    """An index comes again in the next epoch, and may then wait twice."""
    same = Item(0, 6)
    assert fill([same, same, same, same], 20, 4) == ([same, same, same], [same])


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 12), st.integers(1, 6))
def test_batches_are_packs_of_a_queue(sizes, batch_size, buffer, clips):
    """Kept by hand: clips come in the data's order, the oldest always goes, and nothing is lost or taken twice."""
    order, queue, come = Items(sizes), [], 0
    iterator = iter(packed(sizes, batch_size, TOKENS, clips, buffer))
    for _ in range(8):
        batch, deferred = next(iterator)
        assert len(batch) == batch_size and deferred == [0]
        for pack in batch:
            while len(queue) < buffer:
                queue.append(order[come])
                come += 1
            assert pack[0] == queue[0]  # so a clip waits for at most `buffer` packs
            assert len(pack) <= clips
            assert sum(item.tokens for item in pack) <= TOKENS
            for item in pack:
                queue.remove(item)
    assert waiting(iterator) == [item.number for item in queue]


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 8))
def test_each_clip_comes_once_an_epoch(sizes, buffer):
    """Neighbouring epochs mix, as those that wait are overtaken; with what waits they are whole."""
    iterator, seen = iter(packed(sizes, 1, buffer=buffer)), []
    while len(seen) < 3 * len(sizes):
        seen += clips_of([next(iterator).packs])
    left = [Items(sizes)[number] for number in waiting(iterator)]
    times = collections.Counter(item.index for item in seen + left)
    assert set(times) == set(range(len(sizes)))
    assert max(times.values()) - min(times.values()) <= 1
    # With a buffer of one there is no choice: the data's order, an epoch after the other.
    plain = [item.index for item in clips_of(taken(packed(sizes, 1, buffer=1), 2 * len(sizes)))]
    for start in (0, len(sizes)):
        assert sorted(plain[start : start + len(sizes)]) == list(range(len(sizes)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, TOKENS), st.integers(1, 12))
def test_no_clip_starves(odd, buffer):
    """A clip that fits with no other is packed when it is the oldest."""
    sizes = [10] * 9 + [odd]
    batches = taken(packed(sizes, 1, TOKENS, 2, buffer), 30)
    places = [number for number, batch in enumerate(batches) for item in batch[0] if item.index == 9]
    assert places[0] <= 10
    assert max(np.diff(places), default=0) <= 10 + buffer


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(0, 12), st.integers(1, 3), st.integers(1, 12))
def test_from_a_state_an_iterator_goes_on_with_the_same_packs(sizes, before, batch_size, buffer):
    dataset = packed(sizes, batch_size, buffer=buffer)
    iterator = iter(dataset)
    for _ in range(before):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(6)]
    other = iter(packed(sizes, batch_size, buffer=buffer))
    next(other)  # wherever it stands
    other.set_state(json.loads(state))
    assert [next(other) for _ in range(6)] == expected
    assert json.loads(json.dumps(other.get_state())) == json.loads(json.dumps(iterator.get_state()))


def test_a_state_is_a_copy():
    iterator = iter(packed([3, 5, 7, 11, 13]))
    next(iterator)
    state = iterator.get_state()
    kept = json.dumps(state)
    next(iterator)
    assert json.dumps(state) == kept


def test_the_seed_changes_the_packs():
    sizes = np.random.default_rng(0).integers(1, TOKENS, 50).tolist()
    first, again, other = (taken(packed(sizes, seed=seed), 5) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ([5 * 16 * 16, 16 * 16, 3 * 12 * 20, 5 * 12 * 20, 9 * 15, 2 * 16 * 28], 4096),
        (list(range(64, 1281, 16)), 4096),
    ],
)
def test_nearly_all_of_a_pack_is_clips(sizes, tokens):
    rng = np.random.default_rng(0)
    drawn = rng.choice(sizes, 2000).tolist()
    batches = taken(packed(drawn, 4, tokens, 32, 256), 50)
    used = sum(item.tokens for item in clips_of(batches))
    assert used / (50 * 4 * tokens) >= 0.97


@settings(max_examples=10, deadline=None)
@given(SIZES, st.sampled_from([1, 2, 4]), st.integers(0, 4), st.integers(1, 12))
def test_packers_work_alone_and_any_process_can_have_any_of_them(sizes, packers, before, buffer):
    """The slow twin: for each packer one of its own on every n-th number. Then others go on from the merged states."""
    items = Items(sizes)

    class Own:
        def __init__(self, packer):
            self.packer = packer

        def __getitem__(self, number):
            return items[self.packer + number * packers]

    def some(mine=None):
        return Packed(items, 8, TOKENS, CLIPS, buffer, 4, packers=packers, mine=mine)

    twins = [taken(Packed(Own(packer), 8 // packers, TOKENS, CLIPS, buffer), before + 3) for packer in range(packers)]
    whole = [[pack for twin in twins for pack in twin[step]] for step in range(before + 3)]
    assert taken(some(), before + 3) == whole
    iterators = [iter(some([packer])) for packer in range(packers)]
    for step in range(before):
        batches = [next(iterator).packs for iterator in iterators]
        for packer, batch in enumerate(batches):
            rows = range(packer * 8 // packers, (packer + 1) * 8 // packers)
            assert batch == [pack if row in rows else [] for row, pack in enumerate(whole[step])]
    state = {"packers": {}}
    for iterator in iterators:
        state["packers"] |= iterator.get_state()["packers"]
    other = iter(some())
    other.set_state(json.loads(json.dumps(state)))
    assert [next(other).packs for _ in range(3)] == whole[before:]


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 2), st.integers(1, 8), st.integers(1, 5))
def test_clips_that_a_shard_cannot_hold_wait_for_the_next(sizes, shards, packs, buffer, most):
    """Here a shard has room for so many clips; none is lost, the oldest goes, and those that wait are counted."""
    asked = []

    def hold(clips):
        asked.append(len(clips))
        return len(clips) <= most

    items = Items(sizes)
    dataset = Packed(items, shards * packs, TOKENS, CLIPS, buffer, shards, hold)
    iterator, seen, waited = iter(dataset), [], 0
    for _ in range(4):
        oldest = min(waiting(iterator), default=len(seen))
        asked.clear()
        batch = next(iterator)
        assert len(batch.packs) == shards * packs and len(batch.deferred) == shards
        assert sum(batch.deferred) == sum(count > most for count in asked)
        for shard in range(shards):
            clips = clips_of([batch.packs[shard * packs : (shard + 1) * packs]])
            assert 1 <= len(clips) <= most
            seen += clips
        assert oldest in [item.number for item in seen]
        waited += sum(batch.deferred)
    state = json.dumps(iterator.get_state())
    numbers = [item.number for item in seen] + waiting(iterator)
    assert sorted(numbers) == list(range(len(numbers)))
    other = iter(dataset)
    other.set_state(json.loads(state))
    assert next(other) == next(iterator)
