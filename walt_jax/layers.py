"""Shared by the tokenizer, the denoiser and the text encoder: a linear layer with named axes, and what CPUs need."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., Array]


def along_channels(values: Float[Array, " c"]) -> Float[Array, "1 1 1 1 c"]:
    """A value a channel, to be combined with clips."""
    return values[None, None, None, None]


def on_cpu() -> bool:
    """Whether programs are traced for a CPU, some of whose compiler's weaknesses are worked around.

    Decided when a program is traced: `jax.lax.platform_dependent` would trace both ways, in twice the time.
    """
    return jax.default_backend() == "cpu"


def product(x: Float[Array, "*n i"], kernel: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """x W over the last axis.

    On CPUs x is flattened to `[tokens, features]` first: for `[batch, tokens, features]` XLA's CPU backend copies the
    transposed cotangent to form the weight's gradient, which made a train step 2.5 times slower. Elsewhere x keeps its
    axes: flattening merges axes that a mesh may divide, which no sharding can express.
    """
    if not on_cpu():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def stored(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """x, kept in memory on CPUs, where XLA would recompute the sum of all earlier residuals at each use.

    The gradient of a model of six layers takes a fifth less time; see `training.state.COMPILER_OPTIONS`. Elsewhere a
    barrier would only keep XLA from fusing operations.
    """
    return jax.lax.optimization_barrier(x) if on_cpu() else x


class Linear(nn.Module):
    """y = x W + b over the last axis.

    On CPUs the product is one of matrices, see `product`.

    Attributes:
        features: width of the output.
        axes: logical names of the kernel's input and output axes; sharding rules speak of these.
        use_bias: whether there is a b.
        kernel_init: of W, drawn in float32. LeCun normal by default.
        dtype: of the computation. Parameters are kept in float32.
    """

    features: int
    axes: tuple[str, str] = ("embed", "mlp")
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), (x.shape[-1], self.features)
        )
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", bias_init, (self.features,)).astype(self.dtype)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
        return y
