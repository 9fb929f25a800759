"""Attention that keeps all pairs of tokens on the chip: for TPUs and for GPUs."""

import jax.numpy as jnp
from jaxtyping import Array, Int

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit; finite, so that fully masked rows do not give NaN
ATTENDED = "attended"  # names a kernel's results for remat policies

Pair = tuple[Int[Array, "b q"], Int[Array, "b k"]]  # an integer for each query and each key
