"""Schedules keep their sum, lose signal steadily, and end where they say; shifts; the linear one is W.A.L.T's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.config import build
from walt_jax.diffusion.schedule import Schedule
from walt_jax.errors import UserError

SCHEDULES = [
    Schedule("linear"),
    Schedule("linear", zero_terminal_snr=False),
    Schedule("cosine"),
    Schedule("flow"),
    Schedule("scaled_linear", zero_terminal_snr=False),
    Schedule("scaled_linear"),
    Schedule("linear", shift=2.0),
    Schedule("cosine", shift=0.3),
    Schedule("flow", shift=3.0),
]
IDS = [f"{s.name}{'' if s.zero_terminal_snr else '-plain'}-{s.shift:g}" for s in SCHEDULES]
each = pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
named = pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
UNIT = st.floats(0, 1, width=32)
FACTORS = st.floats(0.125, 8, width=32)
FOUR = st.lists(UNIT, min_size=4, max_size=4).map(sorted)

compiled_levels = jax.jit(lambda schedule, time, shift: schedule(time, shift), static_argnums=0)
compiled_time = jax.jit(lambda schedule, alpha: schedule.time_of(alpha), static_argnums=0)


def levels(schedule, times, shift=None):
    times = jnp.asarray(times, jnp.float32)
    shift = None if shift is None else jnp.full_like(times, shift)
    return (np.asarray(x, np.float64) for x in compiled_levels(schedule, times, shift))


@each
@settings(max_examples=20, deadline=None)
@given(times=FOUR, shift=FACTORS)
def test_the_sum_is_kept_and_signal_is_lost(schedule, times, shift):
    for factor in (None, shift):
        alpha, sigma = levels(schedule, times, factor)
        np.testing.assert_allclose(alpha + sigma if schedule.name == "flow" else alpha**2 + sigma**2, 1, atol=1e-6)
        assert (np.diff(alpha) <= 3e-7).all()
        assert (np.diff(sigma) >= -3e-7).all()


@each
def test_signal_falls_at_every_step(schedule):
    alpha, sigma = levels(schedule, np.linspace(0, 1, 1001))
    assert (np.diff(alpha) < 1e-7).all()  # in float32, which rounds it to 1 at first under a small shift
    assert (np.diff(alpha) < 0)[20:].all()
    assert (np.diff(sigma) > -1e-7).all()
    assert (np.diff(sigma) > 0)[:950].all()
    assert (alpha >= 0).all()


@each
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shift", [None, 0.7, 2.6457513])
def test_the_ends_are_exact(schedule, compiled, shift):
    """At t = 1 the signal-to-noise ratio is zero, not small: training must not leak what sampling has not."""
    function = compiled_levels if compiled else lambda schedule, *times: schedule(*times)
    alpha, sigma = function(schedule, jnp.array([0.0, 1.0]), None if shift is None else jnp.full((2,), shift))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha[1] == 0) == (sigma[1] == 1) == schedule.terminal_snr_is_zero


def test_linear_is_ddpms_rescaled_to_zero_terminal_snr():
    """β from 1e-4 to 0.02 in 1000 steps; then s'_t = (s_t − s_T) · s_1 / (s_1 − s_T) with s_t = √ᾱ_t."""
    roots, product = [], 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    rescaled = [(root - last) * first / (first - last) for root in roots]
    for schedule, expected in zip(SCHEDULES[:2], (rescaled, roots), strict=True):
        alpha, sigma = levels(schedule, np.arange(1, 1001) / 1000)
        np.testing.assert_allclose(alpha, expected, atol=2e-6)
        assert alpha[0] == pytest.approx(math.sqrt(1 - 1e-4), abs=1e-7)
        np.testing.assert_allclose(sigma, [math.sqrt(1 - root**2) for root in expected], atol=1e-4)


def test_scaled_linear_is_stable_diffusions():
    """√β goes linearly from √0.00085 to √0.012; diffusers' α at the last step is 0.0683."""
    alpha, sigma = levels(Schedule("scaled_linear", zero_terminal_snr=False), np.arange(1, 1001) / 1000)
    product = 1.0
    for step in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / 999
        product *= 1 - root**2
        assert alpha[step] == pytest.approx(math.sqrt(product), abs=2e-6)
    assert alpha[-1] == pytest.approx(0.0683, abs=1e-4)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


def test_cosine_is_a_quarter_of_a_circle_and_flow_a_straight_line():
    times = np.linspace(0, 1, 101)
    alpha, sigma = levels(Schedule("cosine"), times)
    np.testing.assert_allclose(alpha, [math.cos(math.pi * time / 2) for time in times], atol=1e-6)
    np.testing.assert_allclose(sigma, [math.sin(math.pi * time / 2) for time in times], atol=1e-6)
    alpha, sigma = levels(Schedule("flow"), times)
    np.testing.assert_allclose(alpha, 1 - times, atol=1e-6)
    np.testing.assert_allclose(sigma, times, atol=1e-6)


def test_simple_diffusions_shift():
    """log SNR = −2 log tan(πt/2) + 2 log(64/d): pictures of d = 128 have shift 2."""
    times = np.linspace(0.01, 0.99, 50)
    alpha, sigma = levels(Schedule("cosine", shift=2.0), times)
    expected = [-2 * math.log(math.tan(math.pi * time / 2)) + 2 * math.log(64 / 128) for time in times]
    np.testing.assert_allclose(2 * np.log(alpha / sigma), expected, atol=1e-4)


def test_sd3s_shift_is_one_of_time():
    times = np.linspace(0, 1, 50)
    alpha, sigma = levels(Schedule("flow", shift=3.0), times)
    np.testing.assert_allclose(sigma, 3 * times / (1 + 2 * times), atol=1e-6)
    np.testing.assert_allclose(alpha, 1 - sigma, atol=1e-6)


@named
@settings(max_examples=10, deadline=None)
@given(times=st.lists(st.floats(0.0625, 0.9375, width=32), min_size=4, max_size=4), first=FACTORS, second=FACTORS)
def test_shifts_multiply_the_ratio_and_each_other(name, times, first, second):
    def ratio(own, shift):
        alpha, sigma = Schedule(name, shift=own)(jnp.asarray(times), shift)
        return np.asarray(sigma / alpha)

    plain = ratio(1.0, None)
    np.testing.assert_allclose(ratio(first, None), plain * first, rtol=1e-4)
    np.testing.assert_allclose(ratio(first, jnp.full((4,), second)), plain * first * second, rtol=1e-4)
    per_clip = jnp.array([1.0, first, second, 2.0])
    np.testing.assert_allclose(ratio(1.0, per_clip), plain * np.asarray(per_clip), rtol=1e-4)


@each
@settings(max_examples=20, deadline=None)
@given(times=FOUR)
def test_the_time_of_an_alpha(schedule, times):
    alpha, _ = levels(schedule, times)
    back = compiled_time(schedule, jnp.asarray(alpha, jnp.float32))
    np.testing.assert_allclose(back, times, atol=2e-3)  # near t = 0 α says little about t
    np.testing.assert_allclose(next(levels(schedule, back)), alpha, atol=1e-6)


@each
def test_the_times_of_the_ends_are_exact(schedule):
    assert schedule.time_of(jnp.array([1.0, 0.0])).tolist() == [0, 1]


@each
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_shape_is_the_times(schedule, shape):
    time = jnp.full(shape, 0.5)
    alpha, sigma = schedule(time)
    assert alpha.shape == sigma.shape == schedule(time, time)[0].shape == schedule.time_of(time).shape == shape
    assert alpha.dtype == sigma.dtype == jnp.float32


def test_from_a_config():
    assert build(Schedule, {"name": "flow", "shift": 3}, "diffusion.schedule") == Schedule("flow", shift=3.0)
    with pytest.raises(UserError, match="zero_terminal_snr is off"):
        build(Schedule, {"name": "cosine", "zero_terminal_snr": False}, "diffusion.schedule")
    with pytest.raises(UserError, match="shift is 0"):
        build(Schedule, {"name": "cosine", "shift": 0.0}, "diffusion.schedule")
