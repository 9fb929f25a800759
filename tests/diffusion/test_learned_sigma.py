"""The learned variance lies between DDPM's two, and its loss is a KL divergence that teaches nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion.learned_sigma import log_variance, log_variances, split_sigma, step_before, variational_loss
from walt_jax.diffusion.objective import DiffusionConfig, diffusion_loss, draw
from walt_jax.diffusion.sampler import sample
from walt_jax.diffusion.schedule import STEPS, Schedule

DDPM = Schedule("linear", zero_terminal_snr=False)
BETAS = np.linspace(1e-4, 0.02, STEPS)
BARS = np.cumprod(1 - BETAS)


def levels(schedule, time):
    return tuple(jnp.asarray(level) for level in schedule(jnp.asarray(time, jnp.float32)))


def test_the_bounds_are_ddpms():
    index = np.array([1, 2, 10, 500, 999])  # of β_1 … β_T, from 0
    here, before = levels(DDPM, (index + 1) / STEPS), levels(DDPM, index / STEPS)
    least, most = log_variances(*here, *before)
    np.testing.assert_allclose(np.exp(most), BETAS[index], rtol=5e-3)  # float32: 1 - α² is near 0
    expected = BETAS[index] * (1 - BARS[index - 1]) / (1 - BARS[index])
    np.testing.assert_allclose(np.exp(least), expected, rtol=5e-3)
    np.testing.assert_allclose(log_variance(jnp.full(5, -1.0), least, most), least, rtol=1e-6)
    np.testing.assert_allclose(log_variance(jnp.full(5, 1.0), least, most), most, rtol=1e-6)


@pytest.mark.parametrize("schedule", [DDPM, Schedule("cosine"), Schedule("flow")], ids=lambda s: s.name)
def test_the_loss_is_the_divergence_of_the_steps_distributions(schedule):
    """Added up numerically, of one value: q(z_s | z_t, x) by Bayes' rule against N(μ of x̂, Σ)."""
    clean, estimate, z, v, time = 0.3, 0.7, 0.5, 0.4, 0.6
    (alpha, sigma), (alpha_to, sigma_to) = levels(schedule, time), levels(schedule, time - 1 / STEPS)
    alpha, sigma, alpha_to, sigma_to = (float(x) for x in (alpha, sigma, alpha_to, sigma_to))
    ratio = alpha / alpha_to
    beta = sigma**2 - ratio**2 * sigma_to**2

    def posterior(x):
        precision = 1 / sigma_to**2 + ratio**2 / beta
        return (alpha_to * x / sigma_to**2 + ratio * z / beta) / precision, 1 / precision

    mean, variance = posterior(clean)
    ours = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(variance))
    grid = np.linspace(mean - 12 * math.sqrt(variance), mean + 12 * math.sqrt(variance), 20001)

    def log_density(mean, variance):
        return -0.5 * (grid - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)

    p = log_density(mean, variance)
    expected = (np.exp(p) * (p - log_density(posterior(estimate)[0], ours))).sum() * (grid[1] - grid[0]) / math.log(2)
    found = variational_loss(
        jnp.array([v]), jnp.array([clean - estimate]), levels(schedule, [time]), levels(schedule, [time - 1 / STEPS])
    )
    np.testing.assert_allclose(found, [expected], rtol=2e-2)  # float32


def test_no_step_ends_without_noise():
    time, before = step_before(jnp.array([0.0, 0.0005, 0.0015, 0.5, 1.0]))
    assert (np.asarray(before) > 0).all()
    np.testing.assert_allclose(time - before, 1 / STEPS, rtol=1e-3)
    np.testing.assert_allclose(time[3:], [0.5, 1.0])


def test_the_prediction_learns_from_its_error_alone():
    latents = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    config = DiffusionConfig(Schedule("linear"))

    def loss(weights, learns):
        def model(noisy, time, estimate):
            prediction = weights[0] * noisy
            return jnp.concatenate([prediction, weights[1] * noisy], -1) if learns else prediction

        tokens = jnp.full((2, 1), 3.0)
        draws = draw(jax.random.key(0), latents.shape, tokens.shape, config)
        return diffusion_loss(model, latents, jnp.ones_like(latents), tokens, None, lambda x: x, draws, config)[0]

    weights = jnp.array([0.3, 0.1])
    plain, both = (jax.grad(loss)(weights, learns) for learns in (False, True))
    np.testing.assert_allclose(both[0], plain[0], rtol=1e-5)
    assert plain[1] == 0 and both[1] != 0
    assert loss(weights, True) > loss(weights, False)


def test_outputs_are_split_where_there_are_two():
    output = jnp.arange(8.0).reshape(1, 1, 8)
    assert split_sigma(output, 8)[1] is None
    prediction, v = split_sigma(output, 4)
    np.testing.assert_array_equal(prediction[0, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(v[0, 0], [4, 5, 6, 7])


def ancestral(v, steps=20):
    noise = np.random.default_rng(1).normal(size=(4096, 2)).astype(np.float32)
    learned = None if v is None else lambda memory: memory
    memory = None if v is None else jnp.full_like(noise, v)

    def predict(z, time, memory):
        return jnp.zeros_like(z), memory

    def at(time):
        return tuple(level[0] for level in DDPM(time[None]))

    return sample("ddpm", predict, jnp.asarray(noise), at, steps, jax.random.key(0), memory, learned)


def test_the_least_variance_is_the_samplers_own():
    np.testing.assert_allclose(ancestral(-1.0), ancestral(None), rtol=1e-3, atol=1e-3)


def test_the_last_step_has_no_noise_and_more_variance_is_more_noise():
    np.testing.assert_allclose(ancestral(1.0), 0, atol=1e-6)  # the estimate, which is 0

    def before_the_last(v):
        def at(time):
            return tuple(level[0] for level in DDPM(0.5 + 0.5 * time[None]))

        noise = np.random.default_rng(1).normal(size=(4096, 2)).astype(np.float32)
        learned = lambda memory: memory  # noqa: E731
        return sample(
            "ddpm",
            lambda z, time, memory: (jnp.zeros_like(z), memory),
            jnp.asarray(noise),
            at,
            1,
            jax.random.key(0),
            jnp.full_like(noise, v),
            learned,
        ).std()

    (alpha, sigma), (alpha_to, sigma_to) = levels(DDPM, 1.0), levels(DDPM, 0.5)
    for v, expected in zip((-1.0, 1.0), log_variances(alpha, sigma, alpha_to, sigma_to), strict=True):
        kept = alpha * sigma_to**2 / (sigma**2 * alpha_to)  # of z
        np.testing.assert_allclose(before_the_last(v) ** 2, kept**2 + math.exp(expected), rtol=0.05)
