"""Noise schedules: z_t = α(t) x + σ(t) ε with α² + σ² = 1, t from 0 (clean) to 1 (noise)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, "*n"]], tuple[Float[Array, "*n"], Float[Array, "*n"]]]

STEPS = 1000


def linear(time: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """DDPM's β from 1e-4 to 0.02 in 1000 steps, rescaled to zero terminal SNR (Lin et al. 2023), as in W.A.L.T."""
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas = jnp.asarray(np.concatenate([[1.0], root]), jnp.float32)
    alpha = jnp.interp(time.reshape(-1), jnp.linspace(0.0, 1.0, STEPS + 1), alphas).reshape(time.shape)
    return alpha, jnp.sqrt(1 - alpha**2)


def cosine(time: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """α = cos(πt/2) (Nichol and Dhariwal 2021, without offset): terminal SNR is zero as it is."""
    # The sine of the complement, for in float32 the cosine of π/2 is not zero.
    return jnp.sin(0.5 * jnp.pi * (1 - time)), jnp.sin(0.5 * jnp.pi * time)


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine}


def schedule(name: str) -> Schedule:
    """The schedule of that name, one of `SCHEDULES`."""
    return SCHEDULES[name]
