"""What the tokenizer, the denoiser and the text encoder share: a linear layer with named axes."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., Array]


def along_channels(values: Float[Array, " c"]) -> Float[Array, "1 1 1 1 c"]:
    """A value a channel, to be combined with clips."""
    return values[None, None, None, None]


class Linear(nn.Module):
    """y = x W + b over the last axis.

    Tokens are flattened to `[tokens, features]` around the product: for `[batch, tokens, features]` XLA's CPU backend
    copies the transposed cotangent to form the weight's gradient, which made a train step 2.5 times slower.

    Attributes:
        features: width of the output.
        axes: logical names of the kernel's input and output axes; sharding rules speak of these.
        use_bias: whether there is a b.
        kernel_init: of W, drawn in float32. LeCun normal unless given.
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
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", bias_init, (self.features,)).astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)
