"""Causal 3-D convolution, whole or streamed, and the down- and upsampling made of it."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from walt_jax.layers import Initializer, along_channels, on_cpu, platform
from walt_jax.parallel.rules import gathered

# What a layer keeps of the frames before a chunk: None at the start of a clip, then a tree of arrays (empty for a
# layer whose kernel spans one frame). It is an argument and a result; there is no other state.
Cache = Any

CONVOLVED = "convolved"  # names the outputs of convolutions for remat policies

# How the same convolution is computed: see `convolve`.
Route = Literal["auto", "folded", "direct"]


def part(cache: Cache, name: str) -> Cache:
    """A sublayer's own cache."""
    return None if cache is None else cache[name]


def pad_in_front(x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t2 h w c"]:
    return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))


def direct(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt kh kw i o"], strides: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 o"]:
    """`convolve` as one operation of XLA's."""
    padding = ((0, 0), *_space_padding(x, kernel, strides))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _space_padding(x: Array, kernel: Array, strides: tuple[int, int, int]) -> list[tuple[int, int]]:
    return jax.lax.padtype_to_pads(x.shape[2:4], kernel.shape[1:3], strides[1:], "SAME")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def by_taps(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt kh kw i o"], strides: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 o"]:
    """`direct`, with a kernel's gradient that is a product for each tap, over all of a clip's positions.

    XLA makes a convolution of that gradient that only sums over clips on a TPU's matrix units: with a clip on a device
    it takes 50 times as long. So it is for the second gradients that R1 needs, without strides.
    """
    return direct(x, kernel, strides)


def _by_taps_forward(x, kernel, strides):
    return by_taps(x, kernel, strides), (x, kernel)


def _by_taps_backward(strides, residuals, slope):
    x, kernel = residuals
    if strides == (1, 1, 1) and kernel.shape[1] % 2 and kernel.shape[2] % 2:
        frames = kernel.shape[0] - 1
        later = jnp.pad(slope, ((0, 0), (frames, frames), (0, 0), (0, 0), (0, 0)))
        x_slope = by_taps(later, kernel[::-1, ::-1, ::-1].swapaxes(3, 4), strides)
    else:
        (x_slope,) = jax.linear_transpose(lambda x: direct(x, kernel, strides), x)(slope)
    padded = jnp.pad(x, ((0, 0), (0, 0), *_space_padding(x, kernel, strides), (0, 0)))
    sizes = [stride * (length - 1) + 1 for stride, length in zip(strides, slope.shape[1:4], strict=True)]

    def of_tap(place):
        seen = jax.lax.dynamic_slice(padded, (0, *place, 0), (len(x), *sizes, x.shape[-1]))
        seen = seen[:, :: strides[0], :: strides[1], :: strides[2]]
        return jnp.einsum("bthwi,bthwo->bio", seen, slope, preferred_element_type=jnp.float32)

    taps = jnp.stack([axis.ravel() for axis in np.indices(kernel.shape[:3], np.int32)], axis=-1)
    # Clips are summed at the end: where devices have different ones, once rather than for each tap.
    kernel_slope = jax.lax.map(of_tap, taps).sum(1).reshape(kernel.shape)
    return x_slope, kernel_slope.astype(kernel.dtype)


by_taps.defvjp(_by_taps_forward, _by_taps_backward)


def convolve(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    strides: tuple[int, int, int],
    route: Route = "auto",
) -> Float[Array, "b t2 h2 w2 o"]:
    """3-D convolution, time not padded, space padded as "SAME".

    Args:
        x: the clip.
        kernel: the taps.
        strides: (time, height, width).
        route: "direct" is one 3-D convolution. "folded" concatenates the time taps as input channels of one 2-D
            convolution over all frames: on CPU, XLA's 3-D convolution runs at a third of the 2-D one's rate. "auto" is
            "folded" on CPU and "direct" elsewhere. Results are equal but for rounding. "direct" has its gradients
            `by_taps` on TPUs.
    """
    if route == "auto":
        route = "folded" if on_cpu() else "direct"
    if route == "direct":
        return (by_taps if platform() == "tpu" else direct)(x, kernel, strides)
    stride_t, *strides_hw = strides
    taps, batch = kernel.shape[0], x.shape[0]
    frames = (x.shape[1] - taps) // stride_t + 1
    folded = jnp.concatenate([x[:, k : k + (frames - 1) * stride_t + 1 : stride_t] for k in range(taps)], axis=-1)
    y = jax.lax.conv_general_dilated(
        rearrange(folded, "b t h w i -> (b t) h w i"),
        rearrange(kernel, "kt kh kw i o -> kh kw (kt i) o"),
        window_strides=strides_hw,
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b t) h w o -> b t h w o", b=batch)


def causal_convolution(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    strides: tuple[int, int, int],
    past: Float[Array, "b kt-1 h w i"] | None = None,
    route: Route = "auto",
) -> tuple[Float[Array, "b t2 h2 w2 o"], Float[Array, "b kt-1 h w i"] | None]:
    """Convolution that pads kt - 1 frames before the clip and none after it.

    Args:
        x: a clip, or a chunk of one. A first chunk of 1 + s·n frames makes 1 + n, a later one of s·n frames makes n.
        kernel: the taps.
        strides: (time, height, width).
        past: the kt - 1 frames before the chunk; None for a first chunk, before which all is zero.
        route: see `convolve`.

    Returns:
        The convolution, and the next chunk's `past` (None where kt is 1).
    """
    taps = kernel.shape[0]
    # The first output is that of frame 0; a later chunk's is that of its frame s - 1, s after the last one's.
    skipped = 0 if past is None else strides[0] - 1
    x = pad_in_front(x, taps - 1) if past is None else jnp.concatenate([past, x], axis=1)
    y = convolve(x[:, skipped:], kernel, strides, route)
    return y, (x[:, x.shape[1] - (taps - 1) :] if taps > 1 else None)


def biased(y: Float[Array, "b t h w o"], bias: Float[Array, " o"]) -> Float[Array, "b t h w o"]:
    """y + bias in the bias's type, which its gradient is added up in."""
    return (y.astype(bias.dtype) + along_channels(bias)).astype(y.dtype)


class CausalConv(nn.Module):
    """`causal_convolution` with parameters.

    Attributes:
        features: channels out.
        kernel_size: (time, height, width) taps.
        strides: (time, height, width); (1 + s·n) frames become 1 + n.
        axes: logical names of the kernel's channels in and out.
        use_bias: whether a bias is added.
        kernel_init: of the kernel.
        route: see `convolve`.
        dtype: of the computation.
    """

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    strides: tuple[int, int, int] = (1, 1, 1)
    axes: tuple[str, str] = ("channels_in", "channels_out")
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    route: Route = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], cache: Cache = None) -> tuple[Float[Array, "b t2 h2 w2 o"], Cache]:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, (None, None, None, *self.axes)),
            (*self.kernel_size, x.shape[-1], self.features),
        )
        kernel = gathered(kernel, (None, None, None, *self.axes), self.dtype)
        y, cache = causal_convolution(x.astype(self.dtype), kernel, self.strides, cache, route=self.route)
        y = checkpoint_name(y, CONVOLVED)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = biased(y, self.param("bias", bias_init, (self.features,)))
        return y, cache


class Downsample(nn.Module):
    """Strided causal convolution; (1 + s·n) frames become 1 + n, and s·n of a later chunk n."""

    features: int
    strides: tuple[int, int, int]
    taps: int = 3
    route: Route = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], cache: Cache = None) -> tuple[Float[Array, "b t2 h2 w2 o"], Cache]:
        conv = CausalConv(
            self.features, (self.taps, 3, 3), self.strides, route=self.route, dtype=self.dtype, name="conv"
        )
        return conv(x, cache)


class Upsample(nn.Module):
    """Convolution, then depth to space (and time): the inverse of `Downsample` in shape.

    The first s - 1 frames of a clip are dropped, so that 1 + n frames become 1 + s·n and frame 0 stays one frame.
    """

    features: int
    strides: tuple[int, int, int]
    taps: int = 3
    route: Route = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], cache: Cache = None) -> tuple[Float[Array, "b t2 h2 w2 o"], Cache]:
        r, p, q = self.strides
        conv = CausalConv(self.features * r * p * q, (self.taps, 3, 3), route=self.route, dtype=self.dtype, name="conv")
        y, after = conv(x, cache)
        y = rearrange(y, "b t h w (r p q c) -> b (t r) (h p) (w q) c", r=r, p=p, q=q)
        return (y[:, r - 1 :] if cache is None else y), after
