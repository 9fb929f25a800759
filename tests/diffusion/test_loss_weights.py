"""min-SNR: whatever is predicted, the same error of x costs the same."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.diffusion.loss_weights import min_snr
from walt_jax.diffusion.parameterization import target

KINDS = ("eps", "x0", "v", "flow")
each = pytest.mark.parametrize("kind", KINDS)


@each
@settings(max_examples=30, deadline=None)
@given(
    angle=st.floats(0.05, math.pi / 2 - 0.05),
    straight=st.booleans(),
    gamma=st.floats(0.5, 20),
    error=st.sampled_from([-2.0, 0.5, 1.0]),
)
def test_an_error_of_x_counts_min_snr_gamma(kind, angle, straight, gamma, error):
    """At one z: what is said of x + error and of x differ by so much that its weighted square is min(SNR, γ) error²."""
    alpha, sigma = math.cos(angle), math.sin(angle)
    if straight:
        alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    z, x = 0.3, -1.1
    right, wrong = (target(kind, x, (z - alpha * x) / sigma, alpha, sigma) for x in (x, x + error))
    weight = float(min_snr(kind, jnp.float32(alpha), jnp.float32(sigma), gamma))
    expected = min((alpha / sigma) ** 2, gamma) * error**2
    assert weight * (wrong - right) ** 2 == pytest.approx(expected, rel=1e-3)


def test_the_papers_formulas():
    """With α² + σ² = 1."""
    angle = np.linspace(0.1, 1.5, 30)
    alpha, sigma = np.cos(angle), np.sin(angle)
    snr = (alpha / sigma) ** 2
    for kind, expected in {
        "x0": np.minimum(snr, 5),
        "eps": np.minimum(snr, 5) / snr,
        "v": np.minimum(snr, 5) / (snr + 1),
    }.items():
        weight = min_snr(kind, jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32), 5.0)
        np.testing.assert_allclose(weight, expected, rtol=1e-3)


@each
def test_finite_at_both_ends(kind):
    """At α = 1 and σ = 0, then at α = 0 and σ = 1, and as close to them as float32 comes."""
    alpha, sigma = jnp.array([1.0, 0.0, 1.0, 1e-30]), jnp.array([0.0, 1.0, 1e-30, 1.0])
    clean, noise = {"x0": (5, 0), "eps": (0, 1), "v": (0, 0), "flow": (0, 0)}[kind]
    np.testing.assert_allclose(min_snr(kind, alpha, sigma, 5.0), [clean, noise] * 2, atol=1e-30)


def test_shapes_and_unknown_kinds():
    ones = jnp.ones((2, 3))
    assert all(min_snr(kind, ones, ones, 5.0).shape == (2, 3) for kind in KINDS)
    with pytest.raises(ValueError, match="'y' is no"):
        min_snr("y", ones, ones, 5.0)
