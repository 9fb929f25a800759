"""ε, x, v and u are four ways to say the same."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.parameterization import clean, target

KINDS = ("eps", "x0", "v", "flow")
NUMBERS = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array)
ANGLES = st.floats(0, math.pi / 2)
INSIDE = st.floats(0.05, math.pi / 2 - 0.05)
# Pairs with α² + σ² = 1, with α + σ = 1, and with neither.
LENGTHS = st.sampled_from([lambda a, s: 1, lambda a, s: a + s, lambda a, s: 0.7])


def pair(angle, length):
    alpha, sigma = math.cos(angle), math.sin(angle)
    return alpha / length(alpha, sigma), sigma / length(alpha, sigma)


def noise(kind, prediction, z, alpha, sigma):
    """The ε that follows from a prediction, where σ is not 0."""
    return (z - alpha * clean(kind, prediction, z, alpha, sigma)) / sigma


def test_by_hand():
    """x = 2, ε = 3, α = 0.6, σ = 0.8."""
    assert [target(kind, 2.0, 3.0, 0.6, 0.8) for kind in KINDS] == pytest.approx([3, 2, 0.6 * 3 - 0.8 * 2, 1])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(x=NUMBERS, eps=NUMBERS, angle=INSIDE, length=LENGTHS)
def test_the_target_leads_back_to_both(kind, x, eps, angle, length):
    alpha, sigma = pair(angle, length)
    z, said = alpha * x + sigma * eps, target(kind, x, eps, alpha, sigma)
    np.testing.assert_allclose(clean(kind, said, z, alpha, sigma), x, atol=1e-10)
    np.testing.assert_allclose(noise(kind, said, z, alpha, sigma), eps, atol=1e-10)


@pytest.mark.parametrize("kind", ["v", "flow"])
@settings(deadline=None)
@given(x=NUMBERS, eps=NUMBERS, angle=st.one_of(ANGLES, st.sampled_from([0, math.pi / 2])), length=LENGTHS)
def test_v_and_flow_lead_back_everywhere_at_both_ends(kind, x, eps, angle, length):
    alpha, sigma = pair(angle, length)
    z, said = alpha * x + sigma * eps, target(kind, x, eps, alpha, sigma)
    np.testing.assert_allclose(clean(kind, said, z, alpha, sigma), x, atol=1e-12)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
@settings(max_examples=20, deadline=None)
@given(z=NUMBERS, said=NUMBERS, angle=INSIDE, length=LENGTHS)
def test_any_statement_can_be_made_in_any_kind(first, second, z, said, angle, length):
    """The x and ε that follow from any prediction add up to z, and another kind can express the same x and ε."""
    alpha, sigma = pair(angle, length)
    x, eps = clean(first, said, z, alpha, sigma), noise(first, said, z, alpha, sigma)
    other = target(second, x, eps, alpha, sigma)
    for kind, prediction in ((first, said), (second, other)):
        x, eps = clean(kind, prediction, z, alpha, sigma), noise(kind, prediction, z, alpha, sigma)
        np.testing.assert_allclose(alpha * x + sigma * eps, z, atol=1e-9)
        np.testing.assert_allclose(x, clean(first, said, z, alpha, sigma), atol=1e-8)
        np.testing.assert_allclose(eps, noise(first, said, z, alpha, sigma), atol=1e-8)
    x, eps = clean(second, other, z, alpha, sigma), noise(second, other, z, alpha, sigma)
    np.testing.assert_allclose(target(first, x, eps, alpha, sigma), said, atol=1e-7)


@settings(deadline=None)
@given(x=NUMBERS, eps=NUMBERS, angle=st.floats(0.01, math.pi / 2 - 0.01))
def test_v_and_u_are_velocities(x, eps, angle):
    """Salimans and Ho: v = dz/dφ of z = cos φ x + sin φ ε. Liu et al.: u = dz/dt of z = (1 − t) x + t ε."""
    step = 1e-6
    after, before = (math.cos(phi) * x + math.sin(phi) * eps for phi in (angle + step, angle - step))
    slope = (after - before) / (2 * step)
    np.testing.assert_allclose(target("v", x, eps, math.cos(angle), math.sin(angle)), slope, atol=1e-7)
    after, before = ((1 - t) * x + t * eps for t in (0.5 + step, 0.5 - step))
    np.testing.assert_allclose(target("flow", x, eps, 0.5, 0.5), (after - before) / (2 * step), atol=1e-7)


@given(NUMBERS, NUMBERS)
def test_the_ends_of_v(x, eps):
    """At t = 1 the target is −x, which the input says nothing about; at t = 0 it is the noise."""
    np.testing.assert_array_equal(target("v", x, eps, 0.0, 1.0), -x)
    np.testing.assert_array_equal(target("v", x, eps, 1.0, 0.0), eps)


@pytest.mark.parametrize("function", [target, clean])
def test_an_unknown_kind_is_refused(function):
    with pytest.raises(ValueError, match="'y' is no"):
        function("y", 1.0, 1.0, 0.6, 0.8)
