"""The global order: every clip once an epoch; parts of batches that processes read."""

import collections
import itertools

import pytest

from walt_jax.data.order import WHOLE, Order, Part


def test_an_epoch_has_each_clip_once():
    order = Order([24], [1.0], seed=3)
    for epoch in range(3):
        assert sorted(order[24 * epoch + number].index for number in range(24)) == list(range(24))


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


@pytest.mark.parametrize("parts", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]])
def test_parts_are_the_rows_of_their_shards(parts):
    rows = [Part(shards, 4).rows(8) for shards in parts]
    assert sorted(itertools.chain.from_iterable(rows)) == WHOLE.rows(8) == list(range(8))
    assert all(row // 2 in shards for some, shards in zip(rows, parts, strict=True) for row in some)
    assert rows == [sorted(some) for some in rows]
