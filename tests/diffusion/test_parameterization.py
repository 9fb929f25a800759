"""v, x and ε are three ways to say the same."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.parameterization import clean_from_velocity, noise_from_velocity, velocity

NUMBERS = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array)
ANGLES = st.floats(0, math.pi / 2)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, ANGLES)
def test_velocity_leads_back_to_both(x, noise, angle):
    alpha, sigma = math.cos(angle), math.sin(angle)
    z, v = alpha * x + sigma * noise, velocity(x, noise, alpha, sigma)
    np.testing.assert_allclose(clean_from_velocity(v, z, alpha, sigma), x, atol=1e-12)
    np.testing.assert_allclose(noise_from_velocity(v, z, alpha, sigma), noise, atol=1e-12)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, ANGLES)
def test_any_prediction_explains_what_was_seen(z, v, angle):
    """Whatever a network says v is, the x and ε that follow from it add up to z, and have that v."""
    alpha, sigma = math.cos(angle), math.sin(angle)
    x, noise = clean_from_velocity(v, z, alpha, sigma), noise_from_velocity(v, z, alpha, sigma)
    np.testing.assert_allclose(alpha * x + sigma * noise, z, atol=1e-12)
    np.testing.assert_allclose(velocity(x, noise, alpha, sigma), v, atol=1e-12)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, st.floats(0.01, math.pi / 2 - 0.01))
def test_it_is_the_velocity_along_the_arc(x, noise, angle):
    """Salimans and Ho: v = dz/dφ of z = cos φ x + sin φ ε."""
    step = 1e-6
    after, before = (math.cos(phi) * x + math.sin(phi) * noise for phi in (angle + step, angle - step))
    slope = (after - before) / (2 * step)
    np.testing.assert_allclose(velocity(x, noise, math.cos(angle), math.sin(angle)), slope, atol=1e-7)


@given(NUMBERS, NUMBERS)
def test_the_ends(x, noise):
    """At t = 1 the target is −x, which the input says nothing about; at t = 0 it is the noise."""
    np.testing.assert_array_equal(velocity(x, noise, 0.0, 1.0), -x)
    np.testing.assert_array_equal(velocity(x, noise, 1.0, 0.0), noise)
