"""DDIM (Song et al. 2020), trailing: it starts at t = 1, where the signal is zero, as training does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.objective import Denoise, per_clip
from walt_jax.diffusion.parameterization import clean_from_velocity, noise_from_velocity
from walt_jax.diffusion.schedule import Schedule


def guided(denoise: Callable[..., Array], scale: float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): v = v_uncond + scale · (v_cond − v_uncond).

    `denoise` gets twice the batch, first with the condition and then without; what it returns is guided in the first
    half and unconditional in the second, so that each half carries on its own self-conditioning estimate.
    """

    def apply(noisy, time, estimate):
        with_condition, without = jnp.split(denoise(noisy, time, estimate), 2)
        return jnp.concatenate([without + scale * (with_condition - without), without])

    return apply


def ddim(
    denoise: Denoise, noise: Float[Array, "b t h w c"], schedule: Schedule, steps: int
) -> Float[Array, "b t h w c"]:
    """Integrates from `noise` at t = 1 to clean latents at t = 0 in `steps` evaluations, deterministically."""
    times = jnp.linspace(1.0, 0.0, steps + 1)

    def step(carry, now_and_next):
        z, estimate = carry
        now, after = now_and_next
        time = jnp.full((z.shape[0],), now)
        alpha, sigma = map(per_clip, schedule(time))
        v = denoise(z, time, estimate)
        x, noise = clean_from_velocity(v, z, alpha, sigma), noise_from_velocity(v, z, alpha, sigma)
        alpha, sigma = map(per_clip, schedule(jnp.full_like(time, after)))
        return (alpha * x + sigma * noise, x), None

    (_, x), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), (times[:-1], times[1:]))
    return x
