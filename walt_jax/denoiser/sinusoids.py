"""Sinusoidal embeddings of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TIME_WAVES = 256  # width of the embedding of a time


def timestep_embedding(time: Float[Array, "*n"], dim: int, closed: bool = False) -> Float[Array, "*n d"]:
    """Sinusoids of 1000·t, t in 0..1, as in DiT."""
    step = 1000 * time
    # k/1000 is not exact in float32; snap 1000·t to the nearest integer.
    excess = step - jnp.round(step)
    step = step - jax.lax.stop_gradient(jnp.where(jnp.abs(excess) < 1e-4, excess, 0))
    return sinusoids(step, dim, closed)


def sinusoids(values: Float[Array, "*n"], dim: int, closed: bool = False) -> Float[Array, "*n d"]:
    """Cosines and sines of the values at `dim / 2` frequencies from 1 down to 1/10,000, included if `closed`."""
    # Rounded to float32 as in other implementations: at t = 1 a difference in the last bit is multiplied by 1000.
    exponents = np.float32(-np.log(10_000.0)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2 - closed)
    frequencies = jnp.asarray(np.exp(exponents))
    angles = values[..., None] * jnp.expand_dims(frequencies, tuple(range(values.ndim)))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
