"""Content-adaptive noise levels: what counts as complex, and the time that follows from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.adaptive import adapted_time, complexity
from walt_jax.diffusion.schedule import Schedule

SCHEDULES = [
    Schedule("linear"),
    Schedule("linear", zero_terminal_snr=False),
    Schedule("cosine"),
    Schedule("flow"),
    Schedule("cosine", shift=2.0),
    Schedule("flow", shift=3.0),
]
each = pytest.mark.parametrize("schedule", SCHEDULES)
NOISE = np.random.default_rng(0).normal(size=(2, 8, 16, 16, 4)).astype(np.float32)

adapted = jax.jit(adapted_time, static_argnums=0)
compiled = jax.jit(complexity)


def test_white_noise_is_1_a_flat_clip_0_a_chequerboard_2():
    np.testing.assert_allclose(compiled(NOISE), 1, atol=0.05)
    # Each channel has a level of its own, which is no detail.
    flat = np.broadcast_to(np.array([3.0, -1, 0, 7], np.float32), NOISE.shape)
    np.testing.assert_allclose(compiled(flat), 0, atol=1e-6)
    board = (-1.0) ** np.indices(NOISE.shape)[1:4].sum(0)
    np.testing.assert_allclose(compiled(board.astype(np.float32)), 2, atol=1e-5)


def test_equals_the_loop():
    clip = NOISE[:, :3, :4, :2].astype(np.float64)
    for latents, expected in zip(clip, complexity(jnp.asarray(clip, jnp.float32)), strict=True):
        variance = np.mean([latents[..., c].var() for c in range(4)])
        energies = []
        for axis in range(3):
            squares = []
            for place in np.ndindex(latents.shape[:3]):
                after = tuple(p + (a == axis) for a, p in enumerate(place))
                if after[axis] < latents.shape[axis]:
                    squares += list((latents[after] - latents[place]) ** 2)
            energies.append(np.mean(squares) / (2 * variance))
        assert expected == pytest.approx(np.mean(energies), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(contrast=st.floats(0.01, 100), level=st.floats(-3, 3))
def test_contrast_and_brightness_do_not_matter(contrast, level):
    changed = np.float32(contrast) * (NOISE + np.float32(level))
    np.testing.assert_allclose(compiled(changed), compiled(NOISE), rtol=1e-3)


def test_smoothing_lowers_it_in_space_and_in_time():
    for axis in (1, 2, 3):
        smooth = NOISE + np.roll(NOISE, 1, axis)
        assert (compiled(smooth) < compiled(NOISE) - 0.1).all()


def test_an_image_is_as_complex_as_a_clip_in_which_it_stands_still():
    still = np.broadcast_to(NOISE[:, :1], NOISE.shape)
    np.testing.assert_allclose(complexity(jnp.asarray(NOISE[:, :1])), compiled(still), rtol=1e-5)
    np.testing.assert_allclose(compiled(still), 2 / 3, atol=0.1)
    np.testing.assert_array_equal(complexity(jnp.ones((3, 1, 1, 1, 4))), np.zeros(3))


TIMES = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).map(lambda x: jnp.asarray(x, jnp.float32))
AMOUNTS = st.lists(st.floats(0, 2), min_size=3, max_size=3).map(sorted).map(lambda x: jnp.asarray(x, jnp.float32))


@each
@settings(max_examples=15, deadline=None)
@given(time=TIMES, amount=AMOUNTS, strength=st.floats(0, 2))
def test_the_signal_is_raised_to_a_power(schedule, time, amount, strength):
    """ᾱ(t') = ᾱ(t)^(1 + strength · complexity), as far down as the schedule goes."""
    after = adapted(schedule, time, amount, strength)
    expected = np.asarray(schedule(time)[0], np.float64) ** (2 * (1 + strength * np.asarray(amount, np.float64)))
    least = float(schedule(jnp.float32(1))[0]) ** 2
    np.testing.assert_allclose(np.asarray(schedule(after)[0]) ** 2, np.maximum(expected, least), atol=1e-5)
    assert (after >= time).all()
    assert (after <= 1).all()


@each
@settings(max_examples=15, deadline=None)
@given(time=st.floats(0, 1, width=32), amount=AMOUNTS, strength=st.floats(0, 2))
def test_more_complex_never_means_less_noise(schedule, time, amount, strength):
    after = adapted(schedule, jnp.full((3,), time, jnp.float32), amount, strength)
    assert (jnp.diff(after) >= -1e-6).all()


@each
def test_the_ends_stay_and_no_strength_is_no_change(schedule):
    amount = jnp.array([0.0, 0.5, 1.7])
    for end in (0.0, 1.0):
        assert adapted(schedule, jnp.full((3,), end), amount, 1.5).tolist() == [end] * 3
    time = jnp.array([0.001, 0.4, 0.98])
    np.testing.assert_array_equal(adapted(schedule, time, amount, 0.0), time)
    assert adapted(schedule, time, amount, 1.0)[0] == time[0]
