"""DDIM (Song et al. 2020), trailing: it starts at t = 1, where the signal is zero, as training does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.objective import Denoise, per_clip
from walt_jax.diffusion.parameterization import clean_from_velocity, noise_from_velocity
from walt_jax.diffusion.schedule import Schedule


def ddim(
    conditional: Denoise,
    noise: Float[Array, "b t h w c"],
    schedule: Schedule,
    steps: int,
    unconditional: Denoise | None = None,
    guidance: float = 1.0,
) -> Float[Array, "b t h w c"]:
    """Integrates from `noise` at t = 1 to clean latents at t = 0 in `steps` evaluations, deterministically.

    Args:
        conditional: the model with its condition.
        noise: standard normal.
        schedule: see `diffusion.schedule`.
        steps: evenly spaced in t.
        unconditional: the model without; needed where `guidance` is not 1.
        guidance: of classifier-free guidance (Ho and Salimans 2022), v = v_u + guidance (v_c - v_u), both at the same
            latents. Each of the two is self-conditioned on its own last estimate, as it was in training.
    """
    times = jnp.linspace(1.0, 0.0, steps + 1)

    def step(carry, now_and_next):
        z, estimate, free_estimate = carry
        now, after = now_and_next
        time = jnp.full((z.shape[0],), now)
        alpha, sigma = map(per_clip, schedule(time))
        v = conditional(z, time, estimate)
        estimate = clean_from_velocity(v, z, alpha, sigma)
        if unconditional is not None:
            free = unconditional(z, time, free_estimate)
            free_estimate = clean_from_velocity(free, z, alpha, sigma)
            v = free + guidance * (v - free)
        x, eps = clean_from_velocity(v, z, alpha, sigma), noise_from_velocity(v, z, alpha, sigma)
        alpha, sigma = map(per_clip, schedule(jnp.full_like(time, after)))
        return (alpha * x + sigma * eps, estimate, free_estimate), None

    zeros = jnp.zeros_like(noise)
    (x, _, _), _ = jax.lax.scan(step, (noise, zeros, zeros), (times[:-1], times[1:]))
    return x
