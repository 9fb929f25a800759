"""The training objective: mean squared error of v, with self-conditioning (Chen et al. 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from walt_jax.diffusion.parameterization import clean_from_velocity, velocity
from walt_jax.diffusion.schedule import Schedule

# (noisy latents, time, estimate of the clean latents) -> v
Denoise = Callable[
    [Float[Array, "b t h w c"], Float[Array, " b"], Float[Array, "b t h w c"]], Float[Array, "b t h w c"]
]


def per_clip(x: Float[Array, " b"]) -> Float[Array, "b 1 1 1 1"]:
    return x[:, None, None, None, None]


def velocity_loss(
    denoise: Denoise,
    latents: Float[Array, "b t h w c"],
    key: PRNGKeyArray,
    schedule: Schedule,
    self_conditioning: float,
) -> Float[Array, " b"]:
    """Each clip's loss at a random time.

    Args:
        denoise: the model.
        latents: clean, normalised to unit variance.
        key: draws times, noise and which clips are self-conditioned.
        schedule: see `diffusion.schedule`.
        self_conditioning: probability that a clip sees its own first estimate, through which no gradient flows;
            0.9 in W.A.L.T.
    """
    key_time, key_noise, key_estimate = jax.random.split(key, 3)
    batch = latents.shape[0]
    # Stratified over the batch: the same expectation with less variance (Kingma et al. 2021).
    time = (jax.random.uniform(key_time) + jnp.arange(batch) / batch) % 1.0
    alpha, sigma = map(per_clip, schedule(time))
    noise = jax.random.normal(key_noise, latents.shape)
    noisy = alpha * latents + sigma * noise
    estimate = jnp.zeros_like(latents)
    if self_conditioning > 0:
        first = clean_from_velocity(denoise(noisy, time, estimate), noisy, alpha, sigma)
        chosen = jax.random.bernoulli(key_estimate, self_conditioning, (batch,))
        estimate = jax.lax.stop_gradient(jnp.where(per_clip(chosen), first, 0.0))
    error = denoise(noisy, time, estimate) - velocity(latents, noise, alpha, sigma)
    return jnp.square(error).mean(axis=(1, 2, 3, 4))
