"""DDIM against data whose exact denoiser is known, and guidance against a loop that spells it out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.objective import per_clip
from walt_jax.diffusion.sampler import ddim, guided
from walt_jax.diffusion.schedule import SCHEDULES, cosine, linear

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


def halves(conditional, unconditional):
    """A model that gets a batch with the condition and then one without, as `guided` promises it."""

    def denoise(z, time, estimate):
        parts = zip(*(jnp.split(x, 2) for x in (z, time, estimate)), strict=True)
        return jnp.concatenate([model(*part) for model, part in zip((conditional, unconditional), parts, strict=True)])

    return denoise


def run_guided(denoise, scale, schedule, steps):
    return ddim(guided(denoise, scale), jnp.concatenate([NOISE, NOISE]), schedule, steps)[: len(NOISE)]


def sample_guided(conditional, unconditional, scale, steps):
    return run_guided(halves(conditional, unconditional), scale, linear, steps)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 6))
def test_at_scale_1_it_is_the_conditional_model(steps):
    with_condition, without = depends_on_everything(0.5), depends_on_everything(-1.0)
    sampled = sample_guided(with_condition, without, 1.0, steps)
    np.testing.assert_allclose(sampled, ddim(with_condition, NOISE, linear, steps), atol=1e-4)


def test_at_scale_0_it_is_the_unconditional_model():
    def without(z, time, estimate):
        return jnp.cos(z)

    def with_condition(z, time, estimate):
        return jnp.sin(3 * z)

    np.testing.assert_allclose(
        sample_guided(with_condition, without, 0.0, 5), ddim(without, NOISE, linear, 5), atol=1e-4
    )


@pytest.mark.parametrize("scale", [1.25, 3.0])
def test_both_predictions_are_of_the_same_noisy_latents(scale):
    """Ho and Salimans: v(z) = v(z, ∅) + scale · (v(z, c) − v(z, ∅)), all at one z, the one that is being sampled."""

    def with_condition(z, time, estimate):
        return jnp.sin(2 * z) - per_clip(time)

    def without(z, time, estimate):
        return jnp.cos(z)

    def combined(z, time, estimate):
        return without(z, time, 0) + scale * (with_condition(z, time, 0) - without(z, time, 0))

    expected = spelled_out(combined, NOISE, linear, 6)
    np.testing.assert_allclose(sample_guided(with_condition, without, scale, 6), expected, atol=2e-3)


def test_each_half_is_given_its_own_estimate():
    """The first half's is of the guided prediction, the second's of the unconditional one, both at the sampled z."""
    seen, scale, steps = [], 2.0, 4

    def conditional(z, time, estimate):
        return jnp.sin(2 * z) + 0.3 * estimate

    def unconditional(z, time, estimate):
        return jnp.cos(z) - 0.2 * estimate

    def denoise(z, time, estimate):
        jax.debug.callback(lambda *arrays: seen.append([np.asarray(a) for a in arrays]), time[0], estimate)
        return halves(conditional, unconditional)(z, time, estimate)

    run_guided(denoise, scale, cosine, steps)
    jax.effects_barrier()
    z, estimates = np.asarray(NOISE), [np.zeros(SHAPE, np.float32)] * 2
    for step, (_, estimate) in enumerate(sorted(seen, key=lambda call: -call[0])):
        np.testing.assert_allclose(estimate, np.concatenate(estimates), atol=1e-3)
        time, after = (jnp.full((2,), 1 - (step + k) / steps) for k in (0, 1))
        alpha, sigma = (np.asarray(per_clip(x)) for x in cosine(time))
        plain = np.asarray(unconditional(z, time, estimates[1]))
        v = plain + scale * (np.asarray(conditional(z, time, estimates[0])) - plain)
        estimates = [alpha * z - sigma * v, alpha * z - sigma * plain]
        epsilon = sigma * z + alpha * v
        alpha, sigma = (np.asarray(per_clip(x)) for x in cosine(after))
        z = alpha * estimates[0] + sigma * epsilon
