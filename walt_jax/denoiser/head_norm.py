"""LayerNorm of each head's queries or keys (ViT-22B, Dehghani et al. 2023): by XLA, or by a kernel on TPUs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.denoiser.kernels.head_norm import EPSILON
from walt_jax.denoiser.kernels.sharded import sharded_norm
from walt_jax.layers import flat, platform
from walt_jax.parallel.rules import divided_along


class HeadNorm(nn.Module):
    """LayerNorm of each head's features without a shift; heads share the scale.

    Attributes:
        heads: attention heads.
        dtype: of the result; statistics are in float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b *n d"]) -> Float[Array, "b *n d"]:
        """`x` has the features of all heads, head by head."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        scale = self.param("scale", init, (x.shape[-1] // self.heads,))
        whole = all(self.heads % size == 0 for size in divided_along("heads").values())
        if platform() == "tpu" and whole:
            return sharded_norm(x.astype(self.dtype), scale)
        y = flat(x.reshape(*x.shape[:-1], self.heads, -1).astype(jnp.float32), kept=2)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.maximum(0, jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean))
        y = (y - mean) * (jax.lax.rsqrt(variance + EPSILON) * jnp.expand_dims(scale, tuple(range(y.ndim - 1))))
        return y.reshape(x.shape).astype(self.dtype)
