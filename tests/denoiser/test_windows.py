"""Windows partition a grid of tokens, and number those of a pack so that equal numbers are one window."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRIDS, WINDOWS

from walt_jax.denoiser.layout import place_clips
from walt_jax.denoiser.windows import Window, merge, partition, ranks, window_numbers

AXIS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())  # window, windows on the axis, written as None


def window_and_grid(axes):
    """The window as a config has it, its sizes, and the grid. Where it is None it is the whole axis."""
    grid = tuple(size * count for size, count, _ in axes)
    sizes = tuple(length if whole else size for length, (size, _, whole) in zip(grid, axes, strict=True))
    return Window(*(None if whole else size for size, _, whole in axes)), sizes, grid


@settings(max_examples=20, deadline=None)
@given(st.tuples(AXIS, AXIS, AXIS), st.sampled_from([(), (3,), (2, 3)]))
def test_partition_groups_a_windows_tokens_and_merge_puts_them_back(axes, features):
    window, sizes, grid = window_and_grid(axes)
    assert window.sizes(grid) == sizes
    x = np.arange(2 * math.prod(grid) * math.prod(features)).reshape(2, *grid, *features)
    tokens = x.reshape(2, -1, *features)
    parts = partition(tokens, sizes, grid)
    twin = [
        x[clip, t : t + sizes[0], y : y + sizes[1], z : z + sizes[2]].reshape(-1, *features)
        for clip in range(2)
        for t in range(0, grid[0], sizes[0])
        for y in range(0, grid[1], sizes[1])
        for z in range(0, grid[2], sizes[2])
    ]
    np.testing.assert_array_equal(parts, twin)
    np.testing.assert_array_equal(merge(parts, sizes, grid), tokens)
    np.testing.assert_array_equal(partition(merge(parts, sizes, grid), sizes, grid), parts)


@pytest.mark.parametrize("window", [(2, None, None), (None, 3, 8), (5, 16, 16), (None, None, 5)])
def test_windows_that_do_not_divide_the_grid_are_refused(window):
    with pytest.raises(ValueError, match=r"does not divide a latent grid of \(5, 8, 8\) tokens"):
        Window(*window).sizes((5, 8, 8))


def test_the_papers_windows():
    assert Window(1, None, None).sizes((5, 16, 16)) == (1, 16, 16)
    assert Window(None, 8, 8).sizes((5, 16, 28 - 4)) == (5, 8, 8)
    assert Window(None, 8, 8).sizes((1, 8, 8)) == (1, 8, 8)


def test_a_window_is_never_larger_than_the_largest_clip():
    assert Window(1, None, None).bounds((5, 16, 24)) == (1, 16, 24)
    assert Window(None, 8, 8).bounds((5, 16, 4)) == (5, 8, 4)


def test_names_of_windows_that_differ_differ():
    assert Window(1, None, 8).name == "1×all×8"
    windows = [Window(t, y, x) for t in (None, 1, 11) for y in (None, 1, 11) for x in (None, 1, 11)]
    assert len({window.name for window in windows}) == len(windows)


@settings(max_examples=50, deadline=None)
@given(st.lists(GRIDS, max_size=4), WINDOWS, st.none() | st.sets(st.integers(0, 4)), st.integers(0, 9))
def test_tokens_have_equal_numbers_where_a_loop_finds_them_in_one_window(grids, window, isolated, padding):
    tokens = sum(map(math.prod, grids)) + padding
    positions, _ = place_clips([grids], tokens, 4)
    numbers = window_numbers(positions[0], window, None if isolated is None else np.array(sorted(isolated), np.int32))
    keys = []
    for segment, grid in enumerate(grids):
        for place in np.ndindex(*grid):
            cell = [0 if size is None else axis // size for axis, size in zip(place, window, strict=True)]
            keys.append((segment, *(place if isolated and segment in isolated else cell)))
    keys += [None] * padding
    order = sorted({key for key in keys if key is not None})  # by segments first
    np.testing.assert_array_equal(numbers, [-1 if key is None else order.index(key) for key in keys])


@pytest.mark.parametrize("most", [5, 1000])
def test_ranks_are_places_among_those_that_occur(most):
    """Counted where there are few gaps, sorted where there are many."""
    keys = np.random.default_rng(0).integers(0, most, 30)
    np.testing.assert_array_equal(ranks(keys), [sorted(set(keys.tolist())).index(key) for key in keys])


def test_numbers_do_not_depend_on_where_in_the_pack_a_token_is():
    positions, _ = place_clips([[(2, 3, 4), (1, 5, 2)]], 40, 2)
    order = np.random.default_rng(0).permutation(40)
    window = Window(None, 2, 3)
    np.testing.assert_array_equal(
        window_numbers(positions[0][order], window), window_numbers(positions[0], window)[order]
    )
