"""Schedules keep the variance, lose signal steadily, and have none of it at the end; the linear one is W.A.L.T's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.schedule import SCHEDULES, schedule

each = pytest.mark.parametrize("name", SCHEDULES)
UNIT = st.floats(0, 1, width=32)


def alpha_sigma(name, times):
    return (np.asarray(x, np.float64) for x in jax.jit(schedule(name))(jnp.asarray(times, jnp.float32)))


@each
@settings(max_examples=30, deadline=None)
@given(times=st.lists(UNIT, min_size=4, max_size=4))
def test_variance_is_kept_and_signal_is_lost(name, times):
    alpha, sigma = alpha_sigma(name, sorted(times))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    assert (np.diff(alpha) <= 1e-7).all()
    assert (np.diff(sigma) >= -1e-7).all()


@each
def test_signal_falls_at_every_step(name):
    alpha, sigma = alpha_sigma(name, np.linspace(0, 1, 1001))
    assert (np.diff(alpha) < 0).all()
    assert (np.diff(sigma) > 0)[:990].all()  # in float32, which rounds it to 1 in the end
    assert (alpha >= 0).all()


@each
@pytest.mark.parametrize("compiled", [False, True])
def test_the_ends_are_exact(name, compiled):
    """At t = 1 the signal-to-noise ratio is zero, not small: training must not leak what sampling has not."""
    function = jax.jit(schedule(name)) if compiled else schedule(name)
    alpha, sigma = function(jnp.array([0.0, 1.0]))
    assert alpha.tolist() == [1, 0]
    assert sigma.tolist() == [0, 1]


def test_linear_is_ddpms_rescaled_to_zero_terminal_snr():
    """β from 1e-4 to 0.02 in 1000 steps; then s'_t = (s_t − s_T) · s_1 / (s_1 − s_T) with s_t = √ᾱ_t."""
    roots, product = [], 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    rescaled = [(root - last) * first / (first - last) for root in roots]
    alpha, sigma = alpha_sigma("linear", np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha, rescaled, atol=2e-6)
    assert alpha[0] == pytest.approx(math.sqrt(1 - 1e-4), abs=1e-7)
    np.testing.assert_allclose(sigma, [math.sqrt(1 - root**2) for root in rescaled], atol=1e-4)


def test_cosine_is_a_quarter_of_a_circle():
    times = np.linspace(0, 1, 101)
    alpha, sigma = alpha_sigma("cosine", times)
    np.testing.assert_allclose(alpha, [math.cos(math.pi * time / 2) for time in times], atol=1e-6)
    np.testing.assert_allclose(sigma, [math.sin(math.pi * time / 2) for time in times], atol=1e-6)


@each
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_shape_is_the_times(name, shape):
    alpha, sigma = schedule(name)(jnp.full(shape, 0.5))
    assert alpha.shape == sigma.shape == shape
    assert alpha.dtype == sigma.dtype == jnp.float32
