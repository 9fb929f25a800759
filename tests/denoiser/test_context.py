"""Tokens divided over `context` give one device's results, and move as seldom as they can."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walt_jax.denoiser.windows import contiguous, in_raster, in_windows, merge, partition

SCRIPT = pathlib.Path(__file__).with_name("context_on_eight_devices.py")


@pytest.fixture(scope="module")
def found(on_eight_devices):
    return on_eight_devices(SCRIPT)


def test_outputs_and_gradients_are_those_of_one_device(found):
    assert len(found["worst"]) == 7
    assert all(value < 2e-5 for value, _ in found["worst"].values()), found["worst"]


@pytest.mark.parametrize("mesh", ["data 2 × context 2", "context 4"])
def test_two_exchanges_a_pair_of_blocks(found, mesh):
    """One from frames to windows over all frames, one back; nothing else crosses devices."""
    assert found["forward"][f"frames divide, {mesh}"] == {"all-to-all": 2}


def test_heads_are_exchanged_rather_than_gathered(found):
    """Of four attentions in three frames; what is gathered is the model's output, for its order."""
    counts = found["forward"]["frames don't, context 4"]
    assert counts["all-to-all"] >= 8 and counts.get("all-gather", 0) <= 2


def test_what_divides_neither_windows_nor_heads_is_refused(found):
    assert "context=8 divides neither the windows of an attention, nor its 4 heads" in found["message"]


grids = st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 3))] * 3)


@given(grids)
def test_windows_in_order(axes):
    """Window by window and back, and as rows, as counted one by one."""
    sizes, counts = zip(*axes, strict=True)
    grid = tuple(size * count for size, count in axes)
    number = np.arange(np.prod(grid)).reshape(1, -1)
    expected = [
        number.reshape(grid)[tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, sizes, strict=True))]
        for place in np.ndindex(counts)
    ]
    expected = np.stack([window.ravel() for window in expected])
    assert np.array_equal(in_windows(number, sizes, grid)[0], expected.ravel())
    assert np.array_equal(in_raster(in_windows(number, sizes, grid), sizes, grid), number)
    assert np.array_equal(partition(number, sizes, grid), expected)
    assert np.array_equal(merge(expected, sizes, grid), number)
    assert contiguous(sizes, grid) == np.array_equal(expected.ravel(), number[0])
