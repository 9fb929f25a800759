"""The objective: v's squared error by hand, self-conditioning without a gradient, stratified times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.objective import per_clip, velocity_loss
from walt_jax.diffusion.schedule import SCHEDULES, cosine, linear

SHAPE = (4, 2, 3, 2, 2)
LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)


class Recorder:
    """A model that notes what it is asked; its answer is arbitrary, and depends on all of that."""

    def __init__(self):
        self.calls = []

    def __call__(self, noisy, time, estimate):
        answer = 0.5 * noisy - jnp.cos(7 * per_clip(time)) * estimate + per_clip(time)
        self.calls.append([np.asarray(x, np.float64) for x in (noisy, time, estimate, answer)])
        return answer


def alpha_sigma(schedule, time):
    return (np.asarray(x, np.float64)[:, None, None, None, None] for x in schedule(jnp.asarray(time, jnp.float32)))


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_loss_is_the_squared_error_of_v(schedule, probability):
    model = Recorder()
    losses = velocity_loss(model, LATENTS, jax.random.key(3), schedule, probability)
    noisy, time, _, answer = model.calls[-1]
    alpha, sigma = alpha_sigma(schedule, time)
    x = np.asarray(LATENTS, np.float64)
    noise = (noisy - alpha * x) / sigma
    expected = ((answer - (alpha * noise - sigma * x)) ** 2).reshape(4, -1).mean(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(noise.mean()) < 0.3
    assert 0.7 < noise.std() < 1.3
    assert len(np.unique(noise.round(6))) == noise.size  # no noise is used twice


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_the_loss_of_the_exact_velocity_is_zero(seed, probability):
    def exact(noisy, time, estimate):
        alpha, sigma = map(per_clip, cosine(time))
        return (alpha * noisy - LATENTS) / jnp.maximum(sigma, 1e-4)

    losses = velocity_loss(exact, LATENTS, jax.random.key(seed), cosine, probability)
    np.testing.assert_allclose(losses, np.zeros(4), atol=1e-3)  # the division by σ is that exact near t = 0


def test_the_expected_loss_of_a_model_that_says_nothing():
    """E v² = α² + σ² x² over the noise, so with times spread evenly the mean is that over t."""
    keys = jax.random.split(jax.random.key(0), 2000)
    losses = jax.vmap(lambda key: velocity_loss(lambda z, time, estimate: 0 * z, LATENTS, key, cosine, 0.0))(keys)
    # The mean of cos² and of sin² over a quarter of a circle is a half.
    np.testing.assert_allclose(losses.mean(0), 0.5 + 0.5 * np.square(LATENTS).mean((1, 2, 3, 4)), rtol=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_the_estimate_is_the_models_own_first_guess(schedule):
    model = Recorder()
    velocity_loss(model, LATENTS, jax.random.key(1), schedule, 1.0)
    (noisy, time, none, first), (again, same_time, estimate, _) = model.calls
    np.testing.assert_array_equal(none, np.zeros(SHAPE))
    np.testing.assert_array_equal(again, noisy)
    np.testing.assert_array_equal(same_time, time)
    alpha, sigma = alpha_sigma(schedule, time)
    np.testing.assert_allclose(estimate, alpha * noisy - sigma * first, atol=1e-5)


def test_without_self_conditioning_the_model_is_asked_once():
    model = Recorder()
    velocity_loss(model, LATENTS, jax.random.key(1), linear, 0.0)
    ((_, _, estimate, _),) = model.calls
    np.testing.assert_array_equal(estimate, np.zeros(SHAPE))


def test_no_gradient_flows_through_the_estimate():
    """Of the model w₁ z + w₂ estimate; by hand, with the estimate taken as a constant."""
    model = Recorder()
    key, weights = jax.random.key(2), jnp.array([0.3, 0.7])

    def loss(weights):
        def denoise(noisy, time, estimate):
            return weights[0] * noisy + weights[1] * estimate

        return velocity_loss(denoise, LATENTS, key, cosine, 1.0).sum()

    velocity_loss(model, LATENTS, key, cosine, 1.0)
    noisy, time = model.calls[0][:2]
    alpha, sigma = alpha_sigma(cosine, time)
    x, (w_1, w_2) = np.asarray(LATENTS, np.float64), np.asarray(weights, np.float64)
    estimate = alpha * noisy - sigma * w_1 * noisy
    error = w_1 * noisy + w_2 * estimate - (alpha * (noisy - alpha * x) / sigma - sigma * x)
    by_hand = [2 * (error * term).reshape(4, -1).mean(1).sum() for term in (noisy, estimate)]
    np.testing.assert_allclose(jax.grad(loss)(weights), by_hand, rtol=1e-3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_times_are_stratified_over_the_batch(seed, batch):
    model = Recorder()
    velocity_loss(model, jnp.zeros((batch, 1, 1, 1, 1)), jax.random.key(seed), linear, 0.0)
    time = model.calls[0][1]
    assert ((time >= 0) & (time < 1)).all()
    # One in each of `batch` equal parts of 0..1, at the same place in each.
    np.testing.assert_allclose(np.diff(np.sort(time)), 1 / batch, atol=1e-6)


def drawn(clips, probability, count=2000):
    """For `count` keys: the times, and which clips saw an estimate."""

    def one(key):
        seen = []

        def denoise(noisy, time, estimate):
            seen.append((time, jnp.any(estimate != 0, axis=(1, 2, 3, 4))))
            return noisy

        velocity_loss(denoise, jnp.ones((clips, 1, 1, 1, 1)), key, linear, probability)
        return seen[-1]

    return map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count)))


def test_as_many_clips_see_their_estimate_as_asked_for_whatever_their_time():
    time, chosen = drawn(2, 0.5)
    assert (abs(chosen.mean(0) - 0.5) < 0.05).all()
    both = np.concatenate([time, chosen], axis=1)
    assert (abs(np.corrcoef(both.T)[:2, 2:]) < 0.1).all()
    assert abs(np.corrcoef(chosen.T)[0, 1]) < 0.1  # each clip is drawn for itself


def test_each_clips_time_is_uniform_over_steps():
    time, _ = drawn(3, 0.9)
    for clip in time.T:
        counts, _ = np.histogram(clip, 10, (0, 1))
        assert (abs(counts - 200) < 60).all()


def test_keys_are_all_that_is_random():
    def losses(key):
        return velocity_loss(Recorder(), LATENTS, jax.random.key(key), linear, 0.5)

    np.testing.assert_array_equal(losses(4), losses(4))
    assert not np.array_equal(losses(4), losses(5))
