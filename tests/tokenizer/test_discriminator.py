"""The discriminator: a blur that keeps constants, one logit a clip of any size, a name for each parameter's axes."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.tokenizer.discriminator import CentredConv, Discriminator, DiscriminatorConfig, blur_pool

MODEL = Discriminator(DiscriminatorConfig(base_channels=2, channel_multipliers=(2, 3)))


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(module, x):
    """The module's parameters, all random: what is zero at initialisation would hide mistakes."""
    leaves, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x)))
    return tree.unflatten([0.5 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def blurred(row):
    """The twin for one row of numbers: position i of the result is around 2i and 2i + 1."""
    last = len(row) - 1
    return [
        sum(tap * row[min(max(2 * i - 1 + k, 0), last)] for k, tap in enumerate((1, 3, 3, 1))) / 8
        for i in range(math.ceil(len(row) / 2))
    ]


blur = jax.jit(blur_pool)


@settings(max_examples=6, deadline=None)
@given(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)), st.integers(0, 99))
def test_the_blur_is_1_3_3_1_along_each_axis_at_every_second_position(size, seed):
    x = normal(seed, 2, *size, 2)
    expected = np.asarray(x, np.float64)
    for axis in (1, 2, 3):
        expected = np.apply_along_axis(blurred, axis, expected)
    assert expected.shape[1:4] == tuple(math.ceil(side / 2) for side in size)
    np.testing.assert_allclose(blur(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 4, 5), (5, 3, 2)])
def test_the_blur_keeps_constants_and_makes_one_frame_of_one(size):
    blurred_clip = blur(jnp.full((1, *size, 2), 0.7))
    assert blurred_clip.shape[1:4] == tuple(math.ceil(side / 2) for side in size)
    np.testing.assert_allclose(blurred_clip, 0.7, rtol=1e-6)


def test_a_still_is_blurred_in_space_alone():
    x = normal(0, 1, 1, 6, 4, 1)
    repeated = jnp.tile(x, (1, 5, 1, 1, 1))
    np.testing.assert_allclose(blur(repeated), jnp.tile(blur(x), (1, 3, 1, 1, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 3])
def test_a_convolution_sees_as_many_frames_after_as_before(taps):
    x, module = normal(0, 1, 6, 2, 2, 2), CentredConv(3, taps)
    variables = filled(module, x)

    @jax.jit
    def change(direction):
        return jax.jvp(lambda x: module.apply(variables, x), (x,), (direction,))[1]

    for frame in range(6):
        direction = jnp.zeros_like(x).at[:, frame].set(normal(1, 2, 2, 2))
        reached = np.flatnonzero(np.any(np.asarray(change(direction)) != 0, axis=(0, 2, 3, 4)))
        assert reached.tolist() == [t for t in range(6) if abs(t - frame) <= taps // 2]


def test_the_convolution_is_the_sum_over_its_taps():
    x, module = normal(0, 1, 3, 4, 3, 2), CentredConv(2)
    variables = filled(module, x)
    kernel, bias = (np.asarray(variables["params"][name], np.float64) for name in ("kernel", "bias"))
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((1, 3, 4, 3, 2)) + bias
    for t, h, w in np.ndindex(3, 3, 3):
        expected += padded[:, t : t + 3, h : h + 4, w : w + 3] @ kernel[t, h, w]
    for route in ("folded", "direct"):
        np.testing.assert_allclose(CentredConv(2, route=route).apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    assert set(filled(CentredConv(2, use_bias=False), x)["params"]) == {"kernel"}


@functools.cache
def judge():
    variables = filled(MODEL, jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.float32))
    return variables, jax.jit(lambda clips: MODEL.apply(variables, clips))


@pytest.mark.parametrize("clip", [(1, 8, 8), (17, 16, 16), (5, 12, 20), (4, 7, 9), (1, 1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_clip_of_any_size_has_one_logit_by_the_same_parameters(clip, batch):
    variables, _ = judge()
    logits = jax.eval_shape(MODEL.apply, variables, jax.ShapeDtypeStruct((batch, *clip, 3), jnp.float32))
    assert (logits.shape, logits.dtype) == ((batch,), jnp.dtype(jnp.float32))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jax.ShapeDtypeStruct((batch, *clip, 3), jnp.float32))
    assert jax.tree.map(jnp.shape, nn.meta.unbox(shapes)) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize("frames", [1, 5])
def test_a_clips_logit_is_its_own(frames):
    """No statistics are shared in a batch."""
    _, logits = judge()
    clips = normal(2, 2, frames, 8, 12, 3)
    both, swapped = logits(clips), logits(clips[::-1])
    np.testing.assert_allclose(both, swapped[::-1], rtol=1e-5)
    assert both.shape == (2,)
    assert np.all(np.isfinite(both))
    assert abs(both[0] - both[1]) > 1e-3


def test_computes_in_bfloat16_and_says_float32():
    variables, _ = judge()
    model = Discriminator(MODEL.config, dtype=jnp.bfloat16)
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 5, 8, 8, 3), jnp.float32))
    assert logits.dtype == jnp.float32


def test_every_parameter_has_a_name_for_its_last_axes():
    video = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.float32)
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), video)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    # Two with a kernel and a bias in front, and two each behind and in two blocks, which have a shortcut too.
    assert len(named) == 2 + 2 * 5 + 2 + 2 * 2
    for path, leaf in named.items():
        assert isinstance(leaf, nn.Partitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert leaf.names[-1] == "critic_out", path
        if leaf.value.ndim > 1:
            assert leaf.names[-2] == "critic_in", path
