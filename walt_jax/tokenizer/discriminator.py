"""MAGVIT's discriminator: 3-D convolutions that shrink a clip with an antialiasing blur, down to one number."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.config import Positive
from walt_jax.layers import Linear
from walt_jax.tokenizer.convolution import Route, biased, convolve

BLUR = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
AXES = ("critic_in", "critic_out")  # names that Muon leaves to Adam: the paper's game is balanced for Adam


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's shape.

    Attributes:
        base_channels: width at full resolution (128 in the paper).
        channel_multipliers: a block each, which halves time, height and width (2, 4, 4, 4, 4 in the paper).
    """

    base_channels: Positive
    channel_multipliers: tuple[Positive, ...]


def blur_pool(x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
    """Every second position of time, height and width after a blur by [1, 3, 3, 1] / 8 along each (Zhang 2019).

    n positions become ceil(n / 2). Edges are repeated, so that constants do not change and one frame stays one frame.
    """
    for axis in (1, 2, 3):
        length = x.shape[axis]
        half = math.ceil(length / 2)
        pads = [(0, 0)] * x.ndim
        pads[axis] = (1, 2 * (half - 1) + len(BLUR) - length - 1)
        padded = jnp.pad(x, pads, mode="edge")
        parts = [
            weight * jnp.take(padded, jnp.arange(tap, tap + 2 * half - 1, 2), axis=axis)
            for tap, weight in enumerate(BLUR)
        ]
        x = sum(parts[1:], start=parts[0])
    return x


class CentredConv(nn.Module):
    """A 3-D convolution that sees as many frames after as before."""

    features: int
    taps: int = 3
    use_bias: bool = True
    route: Route = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), (None, None, None, *AXES))
        kernel = self.param("kernel", init, (self.taps, self.taps, self.taps, x.shape[-1], self.features))
        side = self.taps // 2
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (side, side), (0, 0), (0, 0), (0, 0)))
        y = convolve(padded, kernel.astype(self.dtype), (1, 1, 1), self.route)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, AXES[1:])
            y = biased(y, self.param("bias", bias_init, (self.features,)))
        return y


class Discriminator(nn.Module):
    """How real clips look: a logit each.

    MAGVIT's, but that the last grid is averaged where the paper flattens it: one discriminator judges clips of any size
    and length, images among them.
    """

    config: DiscriminatorConfig
    route: Route = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, " b"]:
        """`video` is in -1..1."""

        def conv(features: int, name: str, taps: int = 3, use_bias: bool = True) -> CentredConv:
            return CentredConv(features, taps, use_bias, self.route, self.dtype, name=name)

        def activation(x: Array) -> Array:
            return nn.leaky_relu(x, 0.2)

        cfg = self.config
        x = activation(conv(cfg.base_channels, "conv_in")(video))
        for index, multiplier in enumerate(cfg.channel_multipliers):
            width = cfg.base_channels * multiplier
            h = activation(conv(width, f"block{index}_conv_in")(x))
            h = activation(conv(width, f"block{index}_conv_out")(blur_pool(h)))
            shortcut = conv(width, f"block{index}_shortcut", taps=1, use_bias=False)(blur_pool(x))
            x = (h + shortcut) / math.sqrt(2)
        x = activation(conv(x.shape[-1], "conv_out")(x)).mean(axis=(1, 2, 3))
        x = activation(Linear(x.shape[-1], AXES, dtype=self.dtype, name="dense")(x))
        return Linear(1, AXES, dtype=self.dtype, name="logit")(x)[:, 0].astype(jnp.float32)
