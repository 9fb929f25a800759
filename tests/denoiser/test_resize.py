"""Position tables for another size: unchanged ones stay, and what is linear in the position stays linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.resize import interpolate, resize
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.generation.latent_diffusion import unboxed

sizes = st.tuples(*[st.integers(1, 7)] * 3)


def ramp(shape, slopes):
    """Of equal distance from the first value to the last of each axis, whatever its length."""
    axes = [np.linspace(0, 1, size) * slope for size, slope in zip(shape, slopes, strict=True)]
    return sum(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 99))
def test_an_unchanged_size_changes_nothing(shape, seed):
    table = np.random.default_rng(seed).normal(size=shape)
    np.testing.assert_array_equal(interpolate(table, shape), table)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.floats(-3, 3, width=32))
def test_constant_tables_stay_constant(before, after, value):
    np.testing.assert_array_equal(interpolate(np.full(before, value), after), np.full(after, value))


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(2, 7)] * 3), st.tuples(*[st.integers(2, 7)] * 3))
def test_linear_ramps_stay_ramps(before, after):
    slopes = (1.0, -2.0, 5.0)
    resized = interpolate(ramp(before, slopes), after)
    np.testing.assert_allclose(resized, ramp(after, slopes), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6))
def test_no_offset_stays_in_the_middle(before, after):
    """Of an axis of offsets, which has an odd length."""
    table = np.abs(np.arange(2.0 * before - 1) - (before - 1))
    assert interpolate(table, (2 * after - 1,))[after - 1] == 0


WINDOWS = ((1, None, None), (None, 2, 2))


def shapes_of(grid, windows, scan):
    """A denoiser's parameters, for clips of this many tokens along each axis."""
    config = WaltConfig(
        dim=16, heads=2, layers=2, windows=windows, cross_attention=False, self_conditioning=False, scan=scan
    )
    noisy, time = jnp.zeros((1, int(np.prod(grid)), 3)), jnp.zeros((1, 1))
    init = Denoiser(config, grid).init
    return unboxed(jax.eval_shape(init, jax.random.key(0), noisy, time, Condition(), Layout(grid=grid)))["params"]


@pytest.mark.parametrize("scan", [False, True])
def test_only_tables_of_positions_differ_and_each_has_an_axis_for_each_of_its_clips(scan):
    """Relative tables whose offsets were in one axis would be interpolated across rows."""
    small = shapes_of((1, 2, 4), WINDOWS, scan)
    large = shapes_of((3, 4, 8), ((1, None, None), (None, 4, 2)), scan)
    resized = resize(jax.tree.map(lambda leaf: np.ones(leaf.shape), small), large)
    assert jax.tree.map(np.shape, resized) == jax.tree.map(lambda leaf: leaf.shape, large)
    both = zip(jax.tree_util.tree_leaves_with_path(small), jax.tree.leaves(large), strict=True)
    changed = {path[-1].key: leaf.ndim for (path, leaf), new in both if leaf.shape != new.shape}
    assert changed == {"space_embedding": 4, "time_embedding": 4, "relative_bias": 5 if scan else 4}


def test_other_structures_are_refused():
    with pytest.raises(ValueError, match="can't be interpolated"):
        interpolate(np.zeros((2, 3)), (6,))
    with pytest.raises(ValueError):
        resize({"one": np.zeros(2)}, {"other": np.zeros(2)})
