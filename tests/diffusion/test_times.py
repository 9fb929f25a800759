"""Training times: their distribution, stratified; the shift of clips with more tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.config import build
from walt_jax.diffusion.schedule import Schedule
from walt_jax.diffusion.times import TimesConfig, resolution_shift, sample_times
from walt_jax.errors import UserError

CONFIGS = [TimesConfig(), TimesConfig("logit_normal"), TimesConfig("logit_normal", mean=-0.7, std=1.6)]
each = pytest.mark.parametrize("config", CONFIGS)


def quantiles(config, time):
    """The distribution function at these times, with the error function."""
    time = np.asarray(time, np.float64)
    if config.name == "uniform":
        return time
    normal = (np.log(time / (1 - time)) - config.mean) / config.std
    return np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))(normal)


@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(), (1,), (9,), (2, 3), (4, 1, 2)]))
def test_times_are_stratified_over_all_entries(config, seed, shape):
    time = sample_times(config, jax.random.key(seed), shape)
    assert time.shape == shape
    assert ((time > 0) & (time < 1)).all()
    # One in each of as many parts of equal probability, at the same place in each.
    spread = np.sort(quantiles(config, time).reshape(-1))
    np.testing.assert_allclose(np.diff(spread), 1 / spread.size, atol=1e-4)


@each
def test_each_entry_alone_follows_the_distribution(config):
    keys = jax.random.split(jax.random.key(0), 2000)
    time = jax.jit(jax.vmap(lambda key: sample_times(config, key, (3,))))(keys)
    for entry in quantiles(config, time).T:
        counts, _ = np.histogram(entry, 10, (0, 1))
        assert (abs(counts - 200) < 60).all()


def test_no_time_is_an_end_however_wide_the_distribution():
    time = sample_times(TimesConfig("logit_normal", std=50.0), jax.random.key(0), (1000,))
    assert ((time > 0) & (time < 1)).all()


def test_the_key_is_all_that_is_random():
    first, again, other = (sample_times(CONFIGS[1], jax.random.key(seed), (4,)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_resolution_shift_by_hand():
    """Four times the tokens: SD3's shift 2, so that the flow's t = 1/2 becomes 2/3."""
    shift = resolution_shift(jnp.array([[1024, 256], [64, 0]]), 256)
    np.testing.assert_allclose(shift, [[2, 1], [0.5, 1 / 16]], rtol=1e-6)
    _, sigma = Schedule("flow")(jnp.full((2, 2), 0.5), shift)
    np.testing.assert_allclose(sigma[0], [2 / 3, 1 / 2], rtol=1e-6)
    assert jnp.isfinite(sigma).all()


def test_from_a_config():
    knobs = {"name": "logit_normal", "mean": -0.5, "std": 2}
    assert build(TimesConfig, knobs, "diffusion.times") == TimesConfig("logit_normal", -0.5, 2.0)
    with pytest.raises(UserError, match="read only by 'logit_normal'"):
        build(TimesConfig, {"mean": 0.5}, "diffusion.times")
    with pytest.raises(UserError, match="std is 0"):
        build(TimesConfig, {"name": "logit_normal", "std": 0.0}, "diffusion.times")
