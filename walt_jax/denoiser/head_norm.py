"""LayerNorm of each head's queries or keys (ViT-22B, Dehghani et al. 2023), in two forms with equal results.

The plain form has an axis of heads. A TPU stores rows of 64 or 72 features as rows of 128, and moves all features to
make them; so there the features of all heads stay one axis. Sums over a head, and each head's value for its features,
are products with a matrix of zeros and ones.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.denoiser.context import on_each_device
from walt_jax.layers import platform
from walt_jax.parallel.rules import divided_along

EPSILON = 1e-6


class HeadNorm(nn.Module):
    """LayerNorm of each head's features without a shift; heads share the scale.

    Attributes:
        heads: attention heads.
        dtype: of the result; statistics are in float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """`x` has the features of all heads, head by head."""
        features = x.shape[-1] // self.heads
        init = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        scale = jnp.tile(self.param("scale", init, (features,)), self.heads)
        function = flat if platform() == "tpu" and _whole_heads(self.heads) else split
        x = function(x, features)
        return (x * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(self.dtype)


def _whole_heads(heads: int) -> bool:
    """Whether each device has whole heads."""
    return all(heads % size == 0 for size in divided_along("heads").values())


def split(x: Float[Array, "*n d"], features: int) -> Float[Array, "*n d"]:
    """x standardised over each run of so many features, in float32."""
    y = x.reshape(*x.shape[:-1], -1, features).astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.maximum(0, jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean))
    return ((y - mean) * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)


def flat(x: Float[Array, "*n d"], features: int) -> Float[Array, "*n d"]:
    """`split` without an axis of heads."""
    names = "batch", *["tokens" if x.ndim == 3 else None] * (x.ndim - 2), "heads"
    return on_each_device(functools.partial(_standardised, features), (x,), (names,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _standardised(features: int, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    mean, inverse = _statistics(features, x)
    return x * _spread(features, inverse) - _spread(features, mean * inverse)


def _forward(features, x):
    # The function itself, which hides its products from remat policies that save products: they are wider than x.
    return _standardised(features, x), x


def _backward(features, x, slope):
    mean, inverse = _statistics(features, x)
    scale = _spread(features, inverse)
    y = x * scale - _spread(features, mean * inverse)
    along = _sums(features, slope * y, _pieces(x)) / features
    level = _sums(features, slope, _pieces(x)) / features
    slope = scale * (slope - _spread(features, level) - y * _spread(features, along))
    return (slope.astype(x.dtype),)


_standardised.defvjp(_forward, _backward)


def _statistics(features, x):
    """Each head's mean and inverse standard deviation."""
    wide = x.astype(jnp.float32)
    mean = _sums(features, wide, 1 if x.dtype == jnp.bfloat16 else 3) / features
    square = _sums(features, jnp.square(wide), _pieces(x)) / features
    return mean, jax.lax.rsqrt(jnp.maximum(0, square - jnp.square(mean)) + EPSILON)


def _pieces(x: Array) -> int:
    """bfloat16 numbers that hold a product of two of x's."""
    return 2 if x.dtype == jnp.bfloat16 else 3


def _sums(features: int, x: Float[Array, "*n d"], pieces: int) -> Float[Array, "*n heads"]:
    """Sums over each head's features."""
    ones = _ones(x.shape[-1] // features, features)
    parts = [jnp.dot(piece, ones, preferred_element_type=jnp.float32) for piece in _in_pieces(x, pieces)]
    return sum(parts[1:], start=parts[0])


def _spread(features: int, x: Float[Array, "*n heads"]) -> Float[Array, "*n d"]:
    """Each head's value for each of its features."""
    pieces = jnp.concatenate(_in_pieces(x, 3), axis=-1)
    ones = jnp.tile(_ones(x.shape[-1], features).T, (3, 1))
    return jnp.dot(pieces, ones, preferred_element_type=jnp.float32)


def _ones(heads: int, features: int) -> Float[Array, "d heads"]:
    return jnp.asarray(np.kron(np.eye(heads), np.ones((features, 1))), jnp.bfloat16)


def _in_pieces(x: Float[Array, "*n"], count: int) -> list[Float[Array, "*n"]]:
    """bfloat16 numbers whose sum is x, of 8 bits each: a TPU multiplies these, and float32 only in several passes."""
    pieces = []
    for _ in range(count):
        # A conversion there and back would be left out by XLA.
        piece = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        pieces.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return pieces
