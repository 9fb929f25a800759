"""Weights of 8 bits: the error of each is bounded by its step, and layers compute with what the integers stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from generation.test_generator import make

from walt_jax.generation import int8
from walt_jax.generation.latent_diffusion import SamplingConfig
from walt_jax.generation.lora import layers
from walt_jax.generation.request import Request
from walt_jax.layers import INT8_SCALE, Linear

pytestmark = pytest.mark.usefixtures("quick_compilation")


def meant(params):
    """The float32 parameters that quantised ones stand for: the twin."""
    flat = flatten_dict(params)
    for path in layers(params):
        flat[*path, "kernel"] = (
            np.float32(flat[*path, "kernel"]) * np.asarray(flat.pop((*path, INT8_SCALE)))[..., None, :]
        )
    return unflatten_dict(flat)


@pytest.mark.parametrize("shape", [(40, 7), (3, 40, 7)])
def test_the_error_is_at_most_half_a_step(shape):
    kernel = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) * 10.0 ** -np.arange(7)
    kernel[..., 3] = 0
    whole, step = int8.in_8_bits(kernel)
    assert whole.dtype == jnp.int8 and step.shape == (*shape[:-2], 7)
    error = np.abs(np.float32(whole) * step[..., None, :] - kernel)
    assert (error <= step[..., None, :] * (0.5 + 1e-5)).all()
    for channel in np.ndindex(step.shape):
        own = np.moveaxis(kernel, -2, -1)[channel]
        assert own.any() == (channel[-1] != 3)
        if own.any():  # each channel has its own step, and uses all 127
            np.testing.assert_allclose(step[channel], np.abs(own).max() / 127, rtol=1e-6)
            assert np.abs(np.moveaxis(np.asarray(whole), -2, -1)[channel]).max() == 127


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_computes_with_what_its_integers_stand_for(dtype):
    layer = Linear(7, dtype=jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(0), (2, 5, 40))
    draw = np.random.default_rng(1)
    params = {"kernel": np.float32(draw.normal(size=(40, 7))), "bias": np.float32(draw.normal(size=7))}
    quantised = int8.quantised({"layer": params})["layer"]
    assert set(quantised) == {"kernel", "bias", INT8_SCALE} and quantised["kernel"].dtype == jnp.int8
    found = layer.apply({"params": quantised}, x)
    wanted = (
        np.asarray(x) @ (np.float32(quantised["kernel"]) * np.asarray(quantised[INT8_SCALE])[None]) + params["bias"]
    )
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float32(found), wanted, **({"atol": 1e-4} if dtype == "float32" else {"atol": 0.1}))


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_computes_with_what_its_integers_stand_for(scan):
    generator = make(scan=scan)
    model, small = generator.model, generator.in_int8()
    assert int8.is_quantised(small.params) and not int8.is_quantised(generator.params)
    count = sum(kernel.size for kernel in layers(generator.params).values())
    steps = sum(leaf.size for path, leaf in flatten_dict(small.params).items() if path[-1] == INT8_SCALE)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.params)) for one in (generator, small)]
    assert sizes[0] - sizes[1] == 3 * count - 4 * steps > 0.5 * sizes[0]
    noisy = model.tokens(jax.random.normal(jax.random.key(1), (1, *model.latent_shape)))
    ids = generator.captions.encode(["a red one"])[:, None]

    @jax.jit
    def run(params):
        condition = model.condition(params, ids, noisy, noisy[..., :4] * 0)
        return model.denoise(params, condition, model.layout)(noisy, jnp.full((1, 1), 0.5), noisy)

    found, whole = run(small.params), run(generator.params)
    np.testing.assert_allclose(found, run(meant(small.params)), rtol=1e-4, atol=1e-5)
    assert 1e-5 < np.abs(found - whole).max() < 0.1 * np.abs(whole).max()


def test_samples_of_another_size():
    """Tables of positions are interpolated next to weights of 8 bits."""
    generator = dataclasses.replace(make(positions="learned").in_int8(), config=SamplingConfig(1, batch_size=1))
    [video] = generator.latents([Request("a red one", 1, size=(9, 16, 24))])
    assert video.shape == generator.shape((9, 16, 24)) and np.isfinite(video).all()
