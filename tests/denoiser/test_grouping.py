"""Windows of any length are laid into rows with nothing lost, nothing twice, and little padding."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.grouping import (
    choose_lengths,
    choose_rows,
    choose_text_rows,
    cost,
    group,
    placed,
    scores_computed,
    text_rows,
    text_rows_needed,
)

SHARDS = 2
NUMBERS = st.integers(1, 20).flatmap(
    lambda tokens: (
        st.lists(st.lists(st.integers(-1, 5), min_size=tokens, max_size=tokens), min_size=SHARDS, max_size=3 * SHARDS)
        .filter(lambda packs: len(packs) % SHARDS == 0)
        .map(lambda packs: np.array(packs, np.int32))
    )
)
WINDOWS = st.lists(st.integers(1, 30), min_size=1, max_size=12)
OF_CLIPS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=12)


def padding(lengths, windows):
    """Scores that windows take, each in the shortest row that holds it."""
    return sum(min(length for length in lengths if length >= window) ** 2 for window in windows)


@settings(max_examples=100, deadline=None)
@given(WINDOWS, st.integers(1, 5))
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
    assert padding(chosen, windows) == min(padding(other, windows) for other in others)


def test_with_lengths_enough_nothing_is_padded():
    assert choose_lengths([256, 80, 80, 16, 256], 12) == (16, 80, 256)


def placed_one_by_one(windows, rows):
    """The room that is left in rows: the longest window first, each into the fullest row with room, for its clip too.

    Windows of one clip and length that are next to each other count as one clip.
    """
    room, clips = {}, {}
    for kind, (length, number, most) in enumerate(rows):
        for row in range(number):
            room[kind, row], clips[kind, row] = length, [most, None]
    for window, clip in sorted(windows, key=lambda window: (-window[0], window[1])):
        fitting = [row for row in room if room[row] >= window and (clips[row][0] or clips[row][1] == (window, clip))]
        if not fitting:
            return None
        row = min(fitting, key=lambda row: (clips[row][1] != (window, clip), room[row], clips[row][0]))
        if clips[row][1] != (window, clip):
            clips[row] = [clips[row][0] - 1, (window, clip)]
        room[row] -= window
    return sorted(room.values())


@settings(max_examples=150, deadline=None)
@given(OF_CLIPS, st.dictionaries(st.integers(1, 40), st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_windows_go_into_the_fullest_rows_without_overlap(windows, rows, most):
    rows = tuple((length, number, most) for length, number in sorted(rows.items()))
    first, twin = placed(np.array(windows), rows), placed_one_by_one(windows, rows)
    assert (first is None) == (twin is None)
    if first is None:
        return
    row_of = np.concatenate(
        [np.repeat(np.arange(number) + 1000 * kind, length) for kind, (length, number, _) in enumerate(rows)]
    )
    room = dict(zip(*np.unique(row_of, return_counts=True), strict=True))
    taken, clips = np.zeros(len(row_of), bool), {row: set() for row in room}
    for start, (window, clip) in zip(first, windows, strict=True):
        slots = slice(start, start + window)
        assert not taken[slots].any() and len(set(row_of[slots])) == 1
        taken[slots] = True
        room[row_of[start]] -= window
        clips[row_of[start]].add(clip)
    assert sorted(room.values()) == twin
    assert max(map(len, clips.values())) <= most


@settings(max_examples=60, deadline=None)
@given(st.lists(OF_CLIPS, min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_chosen_rows_hold_the_windows_of_each_shard_and_none_is_idle(shards, most, text):
    shards = [np.array(windows) for windows in shards]
    rows = choose_rows(shards, most, text)
    assert [length for length, *_ in rows] == sorted({length for length, *_ in rows}) and len(rows) <= most
    assert all((clips > 0) == text for _, _, clips in rows)
    assert all(placed(windows, rows) is not None for windows in shards)
    longest = max(int(windows[:, 0].max()) for windows in shards)
    each_in_its_own = ((longest, max(map(len, shards)), int(text)),)
    assert cost(rows) <= cost(each_in_its_own)


def test_equal_windows_take_rows_without_padding():
    shards = [np.full(12, 80)] * 5
    windows = [np.stack([lengths, np.arange(12)], axis=-1) for lengths in shards]
    assert choose_rows(windows) == ((80, 12, 0),)
    assert choose_rows(windows, text=True) == ((80, 12, 1),)
    assert choose_text_rows(shards) == (80, 12)


def test_without_windows_there_is_a_row_nevertheless():
    assert choose_rows([np.zeros((0, 2), int)]) == ((1, 1, 0),)


def windows_of(numbers):
    """The tokens of each window, numbered through the packs of one shard."""
    tokens = numbers.shape[1]
    return sorted(
        tuple(pack * tokens + np.flatnonzero(row == number))
        for pack, row in enumerate(numbers)
        for number in set(row[row >= 0].tolist())
    )


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.integers(1, 3), st.sampled_from([1, SHARDS]), st.booleans())
def test_every_window_is_in_one_row_and_every_token_in_one_slot(numbers, most, shards, text):
    segments = np.where(numbers < 0, -1, numbers // 2)  # two windows a clip, of three at most
    parts = list(zip(np.split(numbers, shards), np.split(segments, shards), strict=True))
    tokens = numbers.shape[1]

    def clip_of(window, of_token):
        return window[0] // tokens * 3 + of_token[window[0] // tokens, window[0] % tokens]

    needs = [[(len(window), clip_of(window, clips)) for window in windows_of(part)] for part, clips in parts]
    rows = choose_rows([np.array(each, int).reshape(-1, 2) for each in needs], most, text)
    groups = group(numbers, segments, 3, rows, shards)
    total, size = numbers.size // shards, sum(length * number for length, number, _ in rows)
    assert groups.slots.shape == groups.slot_window.shape == groups.slot_clip.shape == (shards, size)
    assert groups.place.shape == (shards, total)
    assert scores_computed(groups) == shards * sum(number * length**2 for length, number, _ in rows)
    for shard, (part, of_token) in enumerate(parts):
        slots, windows, place = groups.slots[shard], groups.slot_window[shard], groups.place[shard]
        np.testing.assert_array_equal(windows == -1, slots == total)
        found, start, entry = [], 0, 0
        for length, number, clips in rows:
            for _ in range(number):
                row = slice(start, start + length)
                found += [tuple(sorted(slots[row][windows[row] == w])) for w in set(windows[row].tolist()) - {-1}]
                held = groups.row_clips[shard, entry : entry + clips]
                if text:
                    there = set(groups.slot_clip[shard, row].tolist()) - {-1}
                    assert sorted(held[held < 3 * len(part)]) == sorted(there)
                start, entry = start + length, entry + clips
        assert sorted(found) == windows_of(part)
        for window in found:
            assert {groups.slot_clip[shard, place[token]] for token in window} == {clip_of(window, of_token)}
        inside = part.ravel() >= 0
        np.testing.assert_array_equal(slots[place[inside]], np.flatnonzero(inside))
        assert np.all(place[~inside] == size)


def test_windows_without_room_are_refused():
    with pytest.raises(ValueError, match="1 windows of up to 9 tokens don't fit rows of"):
        group(np.zeros((1, 9), int), np.zeros((1, 9), int), 1, ((4, 2, 0), (8, 1, 0)))
    with pytest.raises(ValueError, match=r"3 windows of up to 3 tokens don't fit"):
        group(np.repeat(np.arange(3), 3)[None], np.zeros((1, 9), int), 1, ((3, 2, 1),))
    with pytest.raises(ValueError, match="2 clips don't fit 2 rows of 4 tokens"):
        text_rows(np.repeat([[0, 1]], 5, axis=1), 2, (4, 2))


SEGMENTS = st.integers(1, 40).flatmap(
    lambda tokens: st.lists(st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens), min_size=2, max_size=2)
)


@settings(max_examples=100, deadline=None)
@given(SEGMENTS, st.integers(1, 20), st.sampled_from([1, 2]))
def test_a_row_for_text_has_tokens_of_one_clip(segments, length, shards):
    segments = np.array(segments)
    tokens = segments.shape[1]
    parts = np.split(segments, shards)
    counts = [
        np.array([np.count_nonzero(row == clip) for row in part for clip in range(4) if clip in row]) for part in parts
    ]
    number = max(max(text_rows_needed(each, length) for each in counts), 1)
    rows = text_rows(segments, 4, (length, number), shards)
    assert rows.slots.shape == (shards, number, length)
    for part, slots, clips, place in zip(parts, rows.slots, rows.clip, rows.place, strict=True):
        flat = part.ravel()
        for clip, members in zip(clips, slots, strict=True):
            members = members[members < flat.size]
            np.testing.assert_array_equal(members // tokens * 4 + flat[members], np.full(len(members), clip))
        np.testing.assert_array_equal(slots.ravel()[place[flat >= 0]], np.flatnonzero(flat >= 0))
        assert np.count_nonzero(slots < flat.size) == np.count_nonzero(flat >= 0)
        assert np.all(place[flat < 0] == slots.size)


@settings(max_examples=60, deadline=None)
@given(st.lists(WINDOWS, min_size=1, max_size=5))
def test_text_rows_suffice_for_each_shard_and_not_more(shards):
    length, number = choose_text_rows([np.array(clips) for clips in shards])
    assert number == max(sum(math.ceil(clip / length) for clip in clips) for clips in shards)
