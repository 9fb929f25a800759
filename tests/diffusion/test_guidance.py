"""Guidance: of any parameterisation alike, its course over time, rescaling, and what it does to a Gaussian."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.config import build
from walt_jax.diffusion.guidance import APGConfig, GuidanceConfig, difference_of, guide, scale_at
from walt_jax.diffusion.parameterization import clean, target
from walt_jax.diffusion.sampler import sample
from walt_jax.diffusion.schedule import Schedule
from walt_jax.errors import UserError

SHAPE = (2, 5, 3)
CONDITIONAL, UNCONDITIONAL, Z = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
TIME = jnp.float32(0.4)


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@settings(max_examples=10, deadline=None)
@given(angle=st.floats(0.2, 1.3), scale=st.floats(0, 5))
def test_guiding_x_is_guiding_any_prediction(kind, angle, scale):
    """Ho and Salimans: said = said_u + w (said_c − said_u), all at the one z."""
    alpha, sigma = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    said, said_without = (target(kind, x, (Z - alpha * x) / sigma, alpha, sigma) for x in (CONDITIONAL, UNCONDITIONAL))
    expected = clean(kind, said_without + np.float32(scale) * (said - said_without), Z, alpha, sigma)
    guided = guide(GuidanceConfig(scale), TIME, CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_allclose(guided, expected, atol=1e-3)


def test_scales_1_and_0():
    np.testing.assert_array_equal(guide(GuidanceConfig(1.0), TIME, CONDITIONAL, UNCONDITIONAL), CONDITIONAL)
    np.testing.assert_allclose(guide(GuidanceConfig(0.0), TIME, CONDITIONAL, UNCONDITIONAL), UNCONDITIONAL, atol=1e-6)
    assert not GuidanceConfig(1.0).needs_unconditional
    assert GuidanceConfig(0.0).needs_unconditional
    assert GuidanceConfig(2.0, "power_cosine", power=4.0).needs_unconditional


def test_the_interval_is_on_inside():
    config = GuidanceConfig(3.0, "interval", interval=(0.25, 0.75))
    times = jnp.array([0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0])
    assert scale_at(config, times).tolist() == [1, 1, 3, 3, 3, 1, 1]
    outside = guide(config, jnp.float32(0.9), CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_array_equal(outside, CONDITIONAL)
    inside = guide(config, TIME, CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_array_equal(inside, guide(GuidanceConfig(3.0), TIME, CONDITIONAL, UNCONDITIONAL))


def test_mdts_power_cosine():
    """(1 − cos(π (1 − t)^4)) / 2 · (scale − 1) + 1: none at noise, all at data, ever more between."""
    config = GuidanceConfig(4.0, "power_cosine", power=4.0)
    times = np.linspace(1, 0, 11)
    scales = np.asarray(scale_at(config, jnp.asarray(times, jnp.float32)))
    expected = [(1 - math.cos((1 - t) ** 4 * math.pi)) * 0.5 * (4 - 1) + 1 for t in times]
    np.testing.assert_allclose(scales, expected, atol=1e-5)
    assert scales[[0, -1]].tolist() == [1, 4]
    assert (np.diff(scales) > 0).all()


def test_rescaling_by_hand():
    """Lin et al.: φ · guided · std(conditional) / std(guided) + (1 − φ) · guided, each clip for itself."""
    guided = guide(GuidanceConfig(3.0), TIME, CONDITIONAL, UNCONDITIONAL)
    rescaled = guide(GuidanceConfig(3.0, rescale=0.7), TIME, CONDITIONAL, UNCONDITIONAL)
    for clip in range(2):
        full = np.asarray(guided[clip]) * CONDITIONAL[clip].std() / np.asarray(guided[clip]).std()
        np.testing.assert_allclose(rescaled[clip], 0.7 * full + 0.3 * np.asarray(guided[clip]), rtol=1e-4)
    whole = guide(GuidanceConfig(3.0, rescale=1.0), TIME, CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_allclose(whole.std((1, 2)), CONDITIONAL.std((1, 2)), rtol=1e-5)
    constant = guide(GuidanceConfig(3.0, rescale=1.0), TIME, jnp.ones(SHAPE), jnp.ones(SHAPE))
    assert jnp.isfinite(constant).all()


def apg_by_hand(conditional, unconditional, scale, parallel, norm, momentum, before):
    """Sadat et al.'s equations for one clip, as a flat vector in float64: (guided, running average of Δ)."""
    average = (conditional - unconditional) + momentum * before
    delta = average * min(1.0, norm / np.linalg.norm(average)) if norm else average
    unit = conditional / np.linalg.norm(conditional)
    along = (delta @ unit) * unit
    return conditional + (scale - 1) * ((delta - along) + parallel * along), average


@pytest.mark.parametrize(("parallel", "norm", "momentum"), [(0.0, 1.5, -0.5), (0.3, 0.0, 0.0), (1.0, 0.7, -0.75)])
def test_apg_by_hand(parallel, norm, momentum):
    """Over three evaluations, each clip for itself."""
    config = GuidanceConfig(3.0, apg=APGConfig(parallel, norm, momentum))
    rng, before, expected_before = np.random.default_rng(1), jnp.zeros(SHAPE), np.zeros((2, 15))
    for _ in range(3):
        conditional, unconditional = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        guided = guide(config, TIME, conditional, unconditional, before)
        before = difference_of(config, conditional, unconditional, before)
        for clip in range(2):
            ours, average = apg_by_hand(
                conditional[clip].ravel().astype(float), unconditional[clip].ravel().astype(float),
                3.0, parallel, norm, momentum, expected_before[clip],
            )  # fmt: skip
            expected_before[clip] = average
            np.testing.assert_allclose(guided[clip].ravel(), ours, atol=1e-4)
            np.testing.assert_allclose(before[clip].ravel(), average, atol=1e-4)


def test_apg_without_effect_is_guidance():
    plain = guide(GuidanceConfig(3.0), TIME, CONDITIONAL, UNCONDITIONAL)
    off = GuidanceConfig(3.0, apg=APGConfig(parallel=1.0, norm=0.0, momentum=0.0))
    np.testing.assert_allclose(guide(off, TIME, CONDITIONAL, UNCONDITIONAL), plain, atol=1e-6)
    np.testing.assert_array_equal(
        guide(GuidanceConfig(1.0, apg=APGConfig()), TIME, CONDITIONAL, UNCONDITIONAL), CONDITIONAL
    )
    zeros = guide(GuidanceConfig(3.0, apg=APGConfig(norm=1.0)), TIME, jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    np.testing.assert_array_equal(zeros, 0)
    measures = {
        off: False,
        GuidanceConfig(3.0, apg=APGConfig(1.0, 0.0, -0.5)): False,
        GuidanceConfig(rescale=0.1): True,
    }
    measures |= {GuidanceConfig(3.0, apg=APGConfig(0.5)): True, GuidanceConfig(3.0, apg=APGConfig(1.0, 2.0)): True}
    for config, expected in measures.items():
        assert config.measures_clips == expected


def test_each_clip_may_have_its_time():
    config = GuidanceConfig(3.0, "power_cosine", power=2.0)
    times = jnp.array([0.1, 0.6])
    together = guide(config, times[:, None, None], CONDITIONAL, UNCONDITIONAL)
    for clip in range(2):
        alone = guide(config, times[clip], CONDITIONAL[clip][None], UNCONDITIONAL[clip][None])
        np.testing.assert_allclose(together[clip], alone[0], atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_moves_a_gaussian_as_far_as_it_should(scale):
    """Two Gaussians of one width: guided, it is a third, whose mean is further along from the free one to the other."""
    schedule, deviation = Schedule("cosine"), 0.4

    def about(mean, z, time):
        alpha, sigma = schedule(time)
        return mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (z - alpha * mean)

    def predict(z, time, memory):
        return guide(GuidanceConfig(scale), time, about(1.0, z, time), about(-0.5, z, time)), memory

    x = jax.jit(lambda noise: sample("dpm++2m", predict, noise, schedule, 50, jax.random.key(0)))(Z)
    np.testing.assert_allclose(x, -0.5 + scale * 1.5 + deviation * Z, atol=0.02)


def test_from_a_config():
    def config(**knobs):
        return build(GuidanceConfig, knobs, "sampling.guidance")

    assert config(scale=2, kind="interval", interval=[0.1, 0.9], rescale=0.5) == GuidanceConfig(
        2.0, "interval", (0.1, 0.9), None, 0.5
    )
    for knobs, message in (
        ({"interval": [0.1, 0.9]}, "read only by kind 'interval'"),
        ({"kind": "interval", "interval": [0.1, 0.9], "power": 4.0}, "read only by kind 'power_cosine'"),
        ({"kind": "interval"}, "interval is missing"),
        ({"kind": "power_cosine"}, "power is missing"),
        ({"kind": "interval", "interval": [0.9, 0.1]}, "lowest"),
        ({"kind": "interval", "interval": [0.5, 1.5]}, "at most 1"),
        ({"kind": "power_cosine", "power": 0.0}, "power is 0"),
        ({"rescale": 1.5}, "at most 1"),
        ({"apg": {"momentum": -1.0}}, "apg.momentum"),
    ):
        with pytest.raises(UserError, match=message):
            config(**knobs)
