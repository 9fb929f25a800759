"""DDIM against data whose exact denoiser is known, and guidance against a loop that spells it out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.objective import per_clip
from walt_jax.diffusion.sampler import ddim
from walt_jax.diffusion.schedule import SCHEDULES, linear

SHAPE = (2, 1, 2, 2, 3)
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
MEAN, DEVIATION = 1.5, 0.4  # of Gaussian data

each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def exact(schedule):
    """E[v | z] for x ~ N(MEAN, DEVIATION²)."""

    def denoise(z, time, estimate):
        alpha, sigma = map(per_clip, schedule(time))
        variance = alpha**2 * DEVIATION**2 + sigma**2
        x = MEAN + alpha * DEVIATION**2 / variance * (z - alpha * MEAN)
        noise = sigma / variance * (z - alpha * MEAN)
        return alpha * noise - sigma * x

    return denoise


@each
def test_converges_at_first_order_to_the_exact_answer(schedule):
    """The flow takes N(0, 1) to N(MEAN, DEVIATION²) and keeps the place in the distribution: x = MEAN + DEVIATION ε."""
    errors = []
    for steps in (25, 50, 100, 200):
        x = jax.jit(lambda noise, steps=steps: ddim(exact(schedule), noise, schedule, steps))(NOISE)
        errors.append(float(np.abs(x - (MEAN + DEVIATION * np.asarray(NOISE))).max()))
    ratios = np.divide(errors[:-1], errors[1:])
    assert errors[-1] < 0.02
    assert (ratios > 1.6).all(), (errors, ratios)
    assert (ratios < 2.5).all(), (errors, ratios)


def spelled_out(denoise, noise, schedule, steps):
    """The twin: DDIM as a loop in numpy, trailing, from pure noise."""
    z, estimate = np.asarray(noise, np.float64), np.zeros(noise.shape)
    for step in range(steps):
        now, after = (float(x[0]) for x in schedule(jnp.array([1 - step / steps]))), 1 - (step + 1) / steps
        alpha, sigma = now
        v = np.asarray(
            denoise(*(jnp.asarray(a, jnp.float32) for a in (z, np.full(len(z), 1 - step / steps), estimate)))
        )
        estimate, epsilon = alpha * z - sigma * v, sigma * z + alpha * v
        alpha, sigma = (float(x[0]) for x in schedule(jnp.array([after])))
        z = alpha * estimate + sigma * epsilon
    return z


def depends_on_everything(offset):
    def denoise(z, time, estimate):
        return jnp.sin(z + offset) + 0.3 * estimate * per_clip(time) - 0.2 * per_clip(time)

    return denoise


@each
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_equals_the_loop(schedule, steps):
    denoise = depends_on_everything(0.5)
    x = ddim(denoise, NOISE, schedule, steps)
    np.testing.assert_allclose(x, spelled_out(denoise, NOISE, schedule, steps), atol=1e-3)


def test_is_deterministic_and_starts_at_pure_noise():
    times = []

    def denoise(z, time, estimate):
        jax.debug.callback(lambda time: times.append(float(time)), time[0])
        return jnp.sin(z)

    first, again = (ddim(denoise, NOISE, linear, 5) for _ in range(2))
    jax.effects_barrier()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(sorted(times[:5], reverse=True), [1, 0.8, 0.6, 0.4, 0.2], atol=1e-6)


def test_a_clip_is_its_own_noise_alone():
    denoise = depends_on_everything(0.0)
    alone = ddim(denoise, NOISE[:1], linear, 4)
    np.testing.assert_allclose(ddim(denoise, NOISE, linear, 4)[:1], alone, atol=1e-5)


def guided(conditional, unconditional, scale, steps, schedule=linear):
    return ddim(conditional, NOISE, schedule, steps, unconditional, scale)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 6))
def test_at_scale_1_it_is_the_conditional_model(steps):
    with_condition, without = depends_on_everything(0.5), depends_on_everything(-1.0)
    sampled = guided(with_condition, without, 1.0, steps)
    np.testing.assert_allclose(sampled, ddim(with_condition, NOISE, linear, steps), atol=1e-4)


def test_at_scale_0_it_is_the_unconditional_model():
    with_condition, without = depends_on_everything(0.5), depends_on_everything(-1.0)
    sampled = guided(with_condition, without, 0.0, 5)
    np.testing.assert_allclose(sampled, ddim(without, NOISE, linear, 5), atol=1e-4)


@each
@pytest.mark.parametrize("scale", [0.5, 1.25, 3.0])
def test_both_predictions_are_of_the_same_latents_and_each_has_its_own_estimate(schedule, scale):
    """Ho and Salimans: v(z) = v(z, ∅) + scale · (v(z, c) − v(z, ∅)), all at the one z that is being sampled."""
    with_condition, without, steps = depends_on_everything(0.5), depends_on_everything(-1.0), 6
    z, estimates = np.asarray(NOISE), [np.zeros(SHAPE, np.float32)] * 2
    for step in range(steps):
        time, after = (jnp.full((2,), 1 - (step + k) / steps) for k in (0, 1))
        (alpha, sigma), (next_alpha, next_sigma) = (
            [np.asarray(per_clip(x)) for x in schedule(t)] for t in (time, after)
        )
        v_c, v_u = (
            np.asarray(model(z, time, estimate))
            for model, estimate in zip((with_condition, without), estimates, strict=True)
        )
        estimates = [alpha * z - sigma * v for v in (v_c, v_u)]
        v = v_u + scale * (v_c - v_u)
        z = next_alpha * (alpha * z - sigma * v) + next_sigma * (sigma * z + alpha * v)
    np.testing.assert_allclose(guided(with_condition, without, scale, steps, schedule), z, atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_sharpens_a_gaussian_as_much_as_it_should(scale):
    """Two Gaussians of one width: guided, it is a third one, whose mean is further along from the free to the other."""

    def about(mean):
        return lambda z, time, estimate: (
            exact(linear)(z - per_clip(linear(time)[0]) * (mean - MEAN), time, estimate)
            - (per_clip(linear(time)[1]) * (mean - MEAN))
        )

    sampled = guided(about(1.0), about(-0.5), scale, 200)
    expected = -0.5 + scale * 1.5 + DEVIATION * np.asarray(NOISE)
    np.testing.assert_allclose(sampled, expected, atol=0.05)
