"""What is done for CPUs alone: products of flattened tokens, and barriers; both change no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.layers import Linear, stored

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
PARAMS = {"kernel": np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32), "bias": np.arange(6.0) / 8}


def layer(params, x):
    """(y, its gradients to parameters and input)"""

    def loss(params, x):
        y = stored(Linear(6).apply({"params": params}, x))
        return jnp.square(y).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, gradients


def trace():
    """The program of `layer`, traced anew: JAX keeps what it has traced of a function."""
    return str(jax.make_jaxpr(lambda params, x: layer(params, x))(PARAMS, X))


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def test_a_linear_layer_is_a_product_over_the_last_axis():
    y, _ = layer(PARAMS, X)
    np.testing.assert_allclose(y, np.einsum("abci,io->abco", X, PARAMS["kernel"]) + PARAMS["bias"], atol=1e-5)


def test_cpus_have_flattened_tokens_and_barriers():
    text = trace()
    assert "optimization_barrier" in text and "f32[24,6]" in text


def test_other_devices_have_neither(elsewhere):
    text = trace()
    assert "optimization_barrier" not in text and "f32[24,6]" not in text


def test_both_give_the_same(request):
    expected = layer(PARAMS, X)
    request.getfixturevalue("elsewhere")
    for one, other in zip(jax.tree.leaves(layer(PARAMS, X)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
