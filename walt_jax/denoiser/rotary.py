"""3-D rotary embedding of a token's place (Su et al. 2021)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from walt_jax.layers import on_cpu
from walt_jax.parallel.analysis import MOVES


def rotate(x: Float[Array, "b n heads d"], coordinates: Int[Array, "b n 3"]) -> Float[Array, "b n heads d"]:
    """3-D rotary embedding: pairs of features turn by t, y or x times their frequency (Su et al. 2021).

    A quarter of the pairs is for time, the rest for height and width by halves, of 64 features 16, 24 and 24. A pair is
    a feature of the first half of them and one of the second.
    """
    pairs = x.shape[-1] // 2
    side = 3 * pairs // 8
    counts = (pairs - 2 * side, side, side)
    angles = jnp.concatenate(
        [
            coordinates[..., axis, None] * (10_000.0 ** -(jnp.arange(count) / count))[None, None]
            for axis, count in enumerate(counts)
        ],
        axis=-1,
    )[:, :, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return x * cos + _partners(x) * sin


def _partners(x: Float[Array, "b n heads d"]) -> Float[Array, "b n heads d"]:
    """The halves of the features, the second first.

    On CPUs by a product with a permutation: XLA's loops that take features apart and put them together again are slow
    there; the gradients of `configs/walt_demo.py` take 1.1 times as long with them.
    """
    pairs = x.shape[-1] // 2
    if on_cpu():
        with jax.named_scope(MOVES):
            return x @ jnp.roll(jnp.eye(2 * pairs, dtype=x.dtype), pairs, axis=0)
    return jnp.concatenate([x[..., pairs:], x[..., :pairs]], axis=-1)
