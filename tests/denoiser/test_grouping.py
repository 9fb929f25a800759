"""Windows of any length are laid into chunks with nothing lost, nothing twice, and little padding."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.grouping import (
    SPARE,
    choose_lengths,
    group,
    scores_computed,
    scores_needed,
    text_rows,
)

NUMBERS = st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=40), min_size=1, max_size=3)


def cost(lengths, windows):
    """Scores that windows take, each in the shortest row that holds it."""
    return sum(min(length for length in lengths if length >= window) ** 2 for window in windows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_no_other_choice_of_lengths_has_less_padding(windows, most):
    chosen = choose_lengths(windows, most)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) <= most
    assert chosen[-1] == max(windows)
    different = sorted(set(windows))
    others = [
        (*some, different[-1])
        for count in range(most)
        for some in itertools.combinations(different[:-1], min(count, len(different) - 1))
    ]
    assert cost(chosen, windows) == min(cost(other, windows) for other in others)


def test_with_lengths_enough_nothing_is_padded():
    assert choose_lengths([256, 80, 80, 16, 256]) == (16, 80, 256)


def arrays(numbers):
    return [np.array(pack, np.int32) for pack in numbers]


def windows_of(numbers):
    """The tokens of each window, numbered through all packs."""
    offsets = np.cumsum([0, *map(len, numbers)])
    return sorted(
        tuple(offset + np.flatnonzero(pack == number))
        for offset, pack in zip(offsets, numbers, strict=False)
        for number in set(pack[pack >= 0])
    )


def rows_of(groups):
    """(length, tokens, windows in the row) of each row of the chunks that are used."""
    chunks = zip(groups.kind, groups.slots, groups.row_window, strict=True)
    for kind, slots, windows in chunks:
        length = groups.lengths[kind - 1] if kind else len(slots)
        whole = len(slots) // length * length
        for start in range(0, whole, length):
            yield kind, slots[start : start + length], windows[start : start + length]
        yield 0, slots[whole:], windows[whole:]  # what is left of a chunk is in no row


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.sets(st.integers(1, 50), max_size=3), st.integers(1, 64))
def test_every_window_is_in_one_row_and_every_token_in_one_slot(numbers, lengths, slots):
    numbers = arrays(numbers)
    windows = windows_of(numbers)
    longest = max(map(len, windows), default=1)
    lengths = tuple(sorted({*lengths, longest}))
    groups = group(numbers, lengths, slots)
    total = sum(map(len, numbers))
    width = max(slots, lengths[-1])
    if len(lengths) == 1:  # whole rows, for then chunks that aren't used are computed as well
        width -= width % lengths[0]
    assert groups.slots.shape == groups.row_window.shape == (len(groups.kind), width)

    found = []
    for kind, tokens, row_window in rows_of(groups):
        np.testing.assert_array_equal(row_window == -1, tokens == total)
        if kind == 0:
            assert np.all(tokens == total)
        found += [tuple(sorted(tokens[row_window == number])) for number in set(row_window[row_window >= 0])]
    assert sorted(found) == windows

    inside = np.concatenate(numbers) >= 0
    np.testing.assert_array_equal(groups.slots.ravel()[groups.place[inside]], np.flatnonzero(inside))
    assert np.all(groups.place[~inside] == groups.slots.size)
    assert scores_computed(groups) >= scores_needed(numbers) == sum(len(window) ** 2 for window in windows)


def test_equal_windows_that_fill_chunks_have_no_padding():
    numbers = arrays([np.repeat(np.arange(8), 8), np.arange(64) % 8])
    groups = group(numbers, (8,), 32)
    assert scores_computed(groups) == scores_needed(numbers) == 16 * 8**2
    assert np.count_nonzero(groups.kind) == 4


def test_small_windows_share_a_row():
    groups = group(arrays([np.repeat(np.arange(8), 4)]), (16,), 16)
    assert np.count_nonzero(groups.kind) == 2


def test_a_window_longer_than_the_longest_row_is_refused():
    with pytest.raises(ValueError, match="a window has 9 tokens, and the longest row 8"):
        group(arrays([[0] * 9]), (4, 8))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=40),
    st.sampled_from([(3, 16), (16,)]),
    st.one_of(st.just(16), st.integers(16, 40)),
)
def test_there_are_few_different_counts_of_chunks(windows, lengths, slots):
    """Each is a program to compile. Were the count what is used, there would be one a batch."""
    tokens = 640
    numbers = np.full(tokens, -1)
    numbers[: sum(windows)] = np.repeat(np.arange(len(windows)), windows)
    groups = group(arrays([numbers]), lengths, slots)
    slots = groups.slots.shape[1]
    # What is computed all at once has none to spare, for they would be computed too.
    count = len(lengths) + math.ceil((1 if groups.all_at_once else SPARE) * tokens / slots)
    counts = [count, math.ceil(SPARE * count), math.ceil(SPARE * math.ceil(SPARE * count))]
    assert len(groups.kind) in counts


def test_more_chunks_are_taken_when_those_there_are_do_not_suffice():
    # Windows of 9 in rows of 16, one a chunk: the 1 + ⌈1.25 · 180 / 16⌉ = 16 chunks hold 16 of the 20, the next 20 all.
    groups = group(arrays([np.repeat(np.arange(20), 9)]), (16,), 16)
    assert not groups.all_at_once
    assert len(groups.kind) == 20
    assert np.count_nonzero(groups.kind) == 20
    # Two rows a chunk, computed at once: 1 + ⌈180 / 32⌉ = 7 chunks, then 9, then 12 hold the 10 that there are.
    groups = group(arrays([np.repeat(np.arange(20), 9)]), (16,), 32)
    assert groups.all_at_once
    assert len(groups.kind) == 12
    assert np.count_nonzero(groups.kind) == 10


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda tokens: st.lists(st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens), min_size=1, max_size=3)
    ),
    st.integers(1, 20),
)
def test_a_row_for_text_has_tokens_of_one_clip(segments, slots):
    segments = np.array(segments)
    rows = text_rows(segments, 4, slots)
    batch, tokens = segments.shape
    flat = segments.ravel()
    # As many rows for all packs of this shape.
    assert rows.slots.shape == (batch * (tokens // slots + 4), slots)
    for clip, members in zip(rows.clip, rows.slots, strict=True):
        members = members[members < flat.size]
        np.testing.assert_array_equal(members // tokens * 4 + flat[members], np.full(len(members), clip))
    np.testing.assert_array_equal(rows.slots.ravel()[rows.place[flat >= 0]], np.flatnonzero(flat >= 0))
    assert np.count_nonzero(rows.slots < flat.size) == np.count_nonzero(flat >= 0)
    assert np.all(rows.place[flat < 0] == rows.slots.size)
