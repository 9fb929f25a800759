"""The causal convolution equals XLA's 3-D one, sees no later frame, and its down- and upsampling fit each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from walt_jax.tokenizer.convolution import CausalConv, Downsample, Upsample, by_taps, causal_convolution, direct

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 6))
KERNELS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
STRIDES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
few = settings(max_examples=20, deadline=None)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(module, x):
    """The module's parameters, all random: what is zero at initialisation would hide mistakes."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    return jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), shapes)


def same(length, kernel, stride):
    """TensorFlow's "SAME": as many zeros as make ceil(length / stride) outputs, the odd one behind."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def convolution_3d(x, kernel, strides):
    """The twin: one 3-D convolution, all zeros of the time axis in front."""
    padding = [(kernel.shape[0] - 1, 0)] + [same(x.shape[i + 1], kernel.shape[i], strides[i]) for i in (1, 2)]
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest"
    )


@few
@given(SIZES, KERNELS, STRIDES, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_equals_xlas_3d_convolution(size, kernel_size, strides, batch, channels_in, channels_out, seed):
    x, kernel = normal(seed, batch, *size, channels_in), normal(seed + 1, *kernel_size, channels_in, channels_out)
    cotangent = normal(seed + 2, *jax.eval_shape(lambda: convolution_3d(x, kernel, strides)).shape)

    def value_and_gradients(convolution):
        y, back = jax.vjp(lambda x, kernel: convolution(x, kernel, strides), x, kernel)
        return y, *back(cotangent)

    def route(name):
        return lambda x, kernel, strides: causal_convolution(x, kernel, strides, route=name)[0]

    routes = (convolution_3d, route("folded"), route("direct"), route("auto"))
    theirs, *ours = jax.jit(lambda: tuple(map(value_and_gradients, routes)))()
    for results in ours:
        for mine, other in zip(results, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=2e-5)


@settings(max_examples=5, deadline=None)
@given(SIZES, KERNELS, STRIDES, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@example((4, 3, 5), (3, 3, 3), (1, 1, 1), 2, 2, 3, 0)
def test_gradients_by_taps_are_those_of_the_convolution(size, kernel_size, strides, batch, channels_in, out, seed):
    """The second ones, too, which R1 needs."""
    size = (size[0] + kernel_size[0] - 1, *size[1:])  # time is not padded here
    x, kernel = normal(seed, batch, *size, channels_in), normal(seed + 1, *kernel_size, channels_in, out)

    def gradients(convolution):
        def loss(x, kernel):
            return jnp.sin(convolution(x, kernel, strides)).sum()

        def of_gradients(x, kernel):
            return sum(jnp.square(each).sum() for each in jax.grad(loss, (0, 1))(x, kernel))

        return jax.grad(loss, (0, 1))(x, kernel), jax.grad(of_gradients, (0, 1))(x, kernel)

    ours, theirs = jax.jit(lambda: tuple(map(gradients, (by_taps, direct))))()
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_a_tap_by_hand():
    """Tap k of kt weighs the frame kt - 1 - k before."""
    x = jnp.arange(1.0, 5)[None, :, None, None, None]
    kernel = jnp.array([100.0, 10, 1])[:, None, None, None, None]
    assert causal_convolution(x, kernel, (1, 1, 1))[0].ravel().tolist() == [1, 12, 123, 234]
    assert causal_convolution(x, kernel, (3, 1, 1))[0].ravel().tolist() == [1, 234]


def sees(function, x):
    """[frames out, frames in]: whether the gradient of an output frame is anything but exactly zero."""

    @jax.jit
    def gradients(x):
        y, back = jax.vjp(function, x)
        # A random projection of each output frame in turn, so that nothing cancels.
        return jax.vmap(back)(jnp.eye(y.shape[1])[:, None, :, None, None, None] * normal(0, *y.shape)[None])[0]

    return np.any(np.asarray(gradients(x)) != 0, axis=(1, 3, 4, 5))


@few
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_no_frame_depends_on_a_later_one(frames, taps, stride):
    kernel = normal(1, taps, 2, 2, 2, 2)
    seen = sees(lambda x: causal_convolution(x, kernel, (stride, 1, 1))[0], normal(0, 1, frames, 2, 2, 2))
    out, into = np.indices(seen.shape)
    np.testing.assert_array_equal(seen, (into <= out * stride) & (into > out * stride - taps))


@few
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), STRIDES)
def test_downsampling_and_upsampling_are_inverse_in_shape(n, height, width, strides):
    s, p, q = strides
    x = jax.ShapeDtypeStruct((2, 1 + s * n, height * p, width * q, 3), jnp.float32)
    (down, _), _ = jax.eval_shape(Downsample(5, strides).init_with_output, jax.random.key(0), x)
    assert down.shape == (2, 1 + n, height, width, 5)
    (up, _), _ = jax.eval_shape(Upsample(3, strides).init_with_output, jax.random.key(0), down)
    assert up.shape == x.shape


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), STRIDES)
def test_upsampling_spreads_channels_over_space_and_time_and_drops_the_first_frames(frames, strides):
    (r, p, q), features = strides, 2
    x = normal(0, 1, frames, 2, 3, 4)
    module = Upsample(features, strides)
    variables = filled(module, x)
    params = variables["params"]["conv"]
    wide = np.asarray(convolution_3d(x, params["kernel"], (1, 1, 1))) + np.asarray(params["bias"])
    full = np.zeros((1, frames * r, 2 * p, 3 * q, features), np.float32)
    for t, h, w in np.ndindex(*wide.shape[1:4]):
        for channel, value in enumerate(wide[0, t, h, w]):
            i, j, k, c = np.unravel_index(channel, (r, p, q, features))
            full[0, t * r + i, h * p + j, w * q + k, c] = value
    up, _ = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(up, full[:, r - 1 :], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_frame_0_is_upsampled_alone_and_each_other_makes_its_own_frames(stride):
    x = normal(0, 1, 3, 2, 2, 2)
    module = Upsample(2, (stride, 2, 2))
    variables = filled(module, x)
    seen = sees(lambda x: module.apply(variables, x)[0], x)
    newest = [max(np.flatnonzero(row)) for row in seen]
    assert newest == [0] + [1] * stride + [2] * stride


def test_the_bias_is_optional_and_the_computation_is_in_the_given_type():
    x = normal(0, 1, 3, 4, 4, 2)
    module = CausalConv(3, (3, 1, 1), dtype=jnp.bfloat16)
    variables = filled(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    y, _ = module.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    twin = np.asarray(convolution_3d(x, variables["params"]["kernel"], (1, 1, 1))) + np.asarray(
        variables["params"]["bias"]
    )
    np.testing.assert_allclose(y.astype(jnp.float32), twin, atol=0.1)
    assert set(filled(CausalConv(3, use_bias=False), x)["params"]) == {"kernel"}
