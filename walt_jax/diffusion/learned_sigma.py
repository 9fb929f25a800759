"""The variance of ancestral sampling, learned with the prediction (Nichol and Dhariwal 2021; DiT).

The model outputs two values for each of the latents': its prediction and v in -1 … 1, which interpolates between the
logarithms of the smallest and the largest variance of a step: β̃ of q(z_s | z_t, x) and β of q(z_t | z_s).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.schedule import STEPS

Level = Float[Array, "..."]


def split_sigma(
    output: Float[Array, "b n k"], width: int
) -> tuple[Float[Array, "b n p"], Float[Array, "b n p"] | None]:
    """The prediction, and v of a model that learns it; None for one with `width` outputs."""
    return output[..., :width], (output[..., width:] if output.shape[-1] > width else None)


def log_variances(alpha: Level, sigma: Level, alpha_to: Level, sigma_to: Level) -> tuple[Level, Level]:
    """(log β̃, log β) of a step from (α, σ) to less noise, (α', σ') with σ' > 0."""
    # 1 - (α/α')², without the difference of nearly equal numbers where α² + σ² = 1
    ratio = alpha / alpha_to
    beta = jnp.maximum((sigma - ratio * sigma_to) * (sigma + ratio * sigma_to), 1e-20)
    return jnp.log(beta) + 2 * (jnp.log(sigma_to) - jnp.log(sigma)), jnp.log(beta)


def log_variance(v: Float[Array, "b n p"], least: Level, most: Level) -> Float[Array, "b n p"]:
    """log Σ of v."""
    share = (v + 1) / 2
    return share * most + (1 - share) * least


def variational_loss(
    v: Float[Array, "b n p"],
    error: Float[Array, "b n p"],
    levels: tuple[Level, Level],
    before: tuple[Level, Level],
) -> Float[Array, "b n p"]:
    """Bits a value by which a step's distribution falls short of q(z_s | z_t, x): a KL divergence of normal ones.

    Gradients through the means are stopped, so that it trains only v. DDPM's last term, the likelihood of 8-bit pixels,
    has no meaning for latents and is left out.

    Args:
        v: the model's.
        error: of its estimate of the clean latents.
        levels: α and σ at each token's time.
        before: the same a thousandth earlier; see `step_before`.
    """
    (alpha, sigma), (alpha_to, sigma_to) = levels, before
    least, most = log_variances(alpha, sigma, alpha_to, sigma_to)
    ours = log_variance(v, least, most)
    # μ̃ - μ = α' β / σ² (x - x̂)
    distance = jax.lax.stop_gradient(alpha_to * jnp.exp(most) / sigma**2 * error)
    return (ours - least + jnp.exp(least - ours) + distance**2 * jnp.exp(-ours) - 1) / (2 * math.log(2))


def step_before(time: Float[Array, "b s"]) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """(t, s) of a step of DDPM's thousand that ends above s = 0."""
    time = jnp.maximum(time, 2 / STEPS)
    return time, time - 1 / STEPS
