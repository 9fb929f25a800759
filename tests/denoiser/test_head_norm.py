"""Queries and keys are normalised over each head, whether heads have an axis or not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from walt_jax.denoiser import head_norm
from walt_jax.denoiser.head_norm import HeadNorm
from walt_jax.denoiser.kernels import head_norm as kernel
from walt_jax.denoiser.kernels.sharded import sharded_norm
from walt_jax.layers import compiling_for

pytestmark = pytest.mark.usefixtures("quick_compilation")


def twin(x, scale, heads, dtype):
    """Flax's, of an axis of heads."""
    y = x.reshape(*x.shape[:-1], heads, -1)
    return nn.LayerNorm(use_bias=False, dtype=dtype).apply({"params": {"scale": scale}}, y).reshape(x.shape)


def of_heads(x, scale, heads, dtype, platform="tpu"):
    with compiling_for(platform):
        return HeadNorm(heads, dtype).apply({"params": {"scale": scale}}, x)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(head_norm, "sharded_norm", functools.partial(sharded_norm, interpret=True))


def with_gradients(function, dtype, *arguments):
    """Values, and gradients of a weighted sum of them."""

    def weighed(x, scale):
        y = function(x, scale, 3, dtype)
        return (y.astype(jnp.float32) * normal(2, *y.shape)).sum(), y

    gradients, y = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))(*arguments)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (y, gradients))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(2, 7, 24), (2, 2, 5, 216)])
def test_equals_a_layer_norm_over_an_axis_of_heads(shape, platform):
    """Far from zero too, and of features that are all equal."""
    x, scale = 3 * normal(0, *shape) + 5, 1 + normal(1, shape[-1] // 3)
    x[0, 0, ..., :8] = 2
    ours = with_gradients(functools.partial(of_heads, platform=platform), jnp.float32, x, scale)
    theirs = with_gradients(twin, jnp.float32, x, scale)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # what is equal has a variance of rounding errors, which its gradients multiply
        keep = np.ones(one.shape, bool)
        if one.ndim > 1:
            keep[0, 0, ..., : shape[-1] // 3] = False
        np.testing.assert_allclose(one[keep], other[keep], rtol=2e-5, atol=2e-5)
    assert np.isfinite(ours[1][0]).all()


def test_numbers_of_16_bits():
    """As exact as Flax's: statistics have the 24 bits of float32, only results are rounded to 8."""
    x, scale = jnp.asarray(3 * normal(0, 2, 50, 216) + 1, jnp.bfloat16), 1 + normal(1, 72)
    exact = with_gradients(twin, jnp.float32, x.astype(jnp.float32), scale)
    for function in (of_heads, twin):
        found = with_gradients(function, jnp.bfloat16, x, scale)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert np.linalg.norm(one - other) < 3e-3 * np.linalg.norm(other)


def test_several_programs(monkeypatch):
    """Rows that don't fill the last one; the scale's gradient is summed over all."""
    monkeypatch.setattr(kernel, "ROWS", 16)
    x, scale = normal(0, 3, 15, 24), 1 + normal(1, 8)
    ours, theirs = (with_gradients(function, jnp.float32, x, scale) for function in (of_heads, twin))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5), ours, theirs)
