"""Causal 3-D convolution, and the down- and upsampling made of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from walt_jax.layers import Initializer


def _pad_in_front(x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t2 h w c"]:
    return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))


def causal_convolution(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kt kh kw i o"], strides: tuple[int, int, int]
) -> Float[Array, "b t2 h2 w2 o"]:
    """Convolution that pads kt - 1 zero frames in front and none behind; space is padded as "SAME".

    The time taps are folded into the input channels of one 2-D convolution over all frames: XLA's 3-D convolution on
    CPU runs at a third of the 2-D one's rate. `tests/tokenizer/test_convolution.py` holds the 3-D twin.
    """
    stride_t, *strides_hw = strides
    taps, batch = kernel.shape[0], x.shape[0]
    frames = -(-x.shape[1] // stride_t)
    padded = _pad_in_front(x, taps - 1)
    folded = jnp.concatenate([padded[:, k : k + (frames - 1) * stride_t + 1 : stride_t] for k in range(taps)], axis=-1)
    y = jax.lax.conv_general_dilated(
        rearrange(folded, "b t h w i -> (b t) h w i"),
        rearrange(kernel, "kt kh kw i o -> kh kw (kt i) o"),
        window_strides=strides_hw,
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b t) h w o -> b t h w o", b=batch)


class CausalConv(nn.Module):
    """`causal_convolution` with parameters.

    Attributes:
        features: channels out.
        kernel_size: (time, height, width) taps.
        strides: (time, height, width); (1 + s·n) frames become 1 + n.
        use_bias: whether a bias is added.
        kernel_init: of the kernel.
        dtype: of the computation.
    """

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    strides: tuple[int, int, int] = (1, 1, 1)
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t2 h2 w2 o"]:
        axes = (None, None, None, "channels_in", "channels_out")
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, axes),
            (*self.kernel_size, x.shape[-1], self.features),
        )
        y = causal_convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:])
            y = y + self.param("bias", bias_init, (self.features,)).astype(self.dtype)[None, None, None, None]
        return y


class Downsample(nn.Module):
    """Strided causal convolution; (1 + s·n) frames become 1 + n."""

    features: int
    strides: tuple[int, int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t2 h2 w2 o"]:
        return CausalConv(self.features, strides=self.strides, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Convolution, then depth to space (and time): the inverse of `Downsample` in shape.

    The first s - 1 frames are dropped, so that 1 + n frames become 1 + s·n and frame 0 stays alone.
    """

    features: int
    strides: tuple[int, int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t2 h2 w2 o"]:
        r, p, q = self.strides
        y = CausalConv(self.features * r * p * q, dtype=self.dtype, name="conv")(x)
        return rearrange(y, "b t h w (r p q c) -> b (t r) (h p) (w q) c", r=r, p=p, q=q)[:, r - 1 :]
