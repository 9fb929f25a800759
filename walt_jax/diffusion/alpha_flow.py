"""α-Flow (Zhang et al. 2025): the mean velocity over any step, from which few evaluations sample.

u(z_t, r, t) is the mean of the velocity along the flow from time t down to r: z_r = z_t − (σ_t − σ_r) u. At r = t it is
the velocity itself, which a flow model predicts. For a time s = α r + (1 − α) t between,

    the loss is α⁻¹ ‖u(z_t, r, t) − (α ṽ + (1 − α) sg u(z_s, r, s))‖²,  z_s = z_t − (σ_t − σ_s) ṽ,

where ṽ is the velocity over the first part of the step. With that of the data, ε − x, α = 1 is flow matching along
straight paths, and α → 0 is MeanFlow (Geng et al. 2025). With the model's own, u(z_t, s, t), the equation holds for the
exact u at any α (SplitMeanFlow, Guo et al. 2025); α = ½ is then shortcut models' (Frans et al. 2025). No derivative of
the model is needed.

Guidance is learned too (iMF, Geng et al. 2025): its scale w and interval are inputs, and the velocity at an instant is

    v_g = (ε − x) + (1 − 1/w) (u_c − u_u),

with the model's own guided and unconditional velocities: at its minimum u_c = u_u + w (v − u_u), classifier-free
guidance of the data's velocity v, in one evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from walt_jax.config import Fraction, Range
from walt_jax.diffusion.objective import Binned, DiffusionConfig, Draws, binned
from walt_jax.diffusion.progressive import Latents
from walt_jax.diffusion.times import TimesConfig, sample_times

STEEPNESS = 25.0  # of the sigmoid by which α falls, over the part of the stage in which it does

# (noisy latents, time, end of the step, w, its interval) -> the mean velocity
Velocity = Callable[
    [Float[Array, "b n p"], Float[Array, "b s"], Float[Array, "b s"], Float[Array, "b s"], Float[Array, "b s 2"]],
    Float[Array, "b n p"],
]


@dataclasses.dataclass(frozen=True)
class AlphaFlowConfig:
    """The loss.

    Attributes:
        velocity: ṽ, over the first part of a step: the "data"'s, or the "model"'s own mean velocity.
        alpha: the smallest α.
        anneal: in which part of the stage, from its start, α falls from 1 along a sigmoid; 0 is at once.
        instants: the share of clips of a batch whose step has no length, r = t.
        scale: the largest w; 1 learns no guidance. w = scale^U, with U uniform.
    """

    velocity: Literal["data", "model"] = "model"
    alpha: Annotated[float, Range(1e-3, 1)] = 0.5
    anneal: Fraction = 0.0
    instants: Fraction = 0.5
    scale: Annotated[float, Range(1)] = 8.0


class StepDraws(NamedTuple):
    """What is random about the steps of a batch's clips.

    Attributes:
        end: r.
        scale: w.
        interval: lowest and highest time of guidance, t_min and t_max: uniform in 0..½ and ½..1.
    """

    end: Float[Array, "b s"]
    scale: Float[Array, "b s"]
    interval: Float[Array, "b s 2"]


def draw_steps(
    key: PRNGKeyArray, time: Float[Array, "b s"], times: TimesConfig, config: AlphaFlowConfig
) -> tuple[Float[Array, "b s"], StepDraws]:
    """(t, the rest): t and r are two draws from the training times, in order; r = t for a share of the clips."""
    key_end, key_order, key_instant, key_scale, key_interval = jax.random.split(key, 5)
    # `sample_times` is stratified along the batch: without another order, r would be close to t.
    other = jax.random.permutation(key_order, sample_times(times, key_end, time.shape).reshape(-1)).reshape(time.shape)
    start, end = jnp.maximum(time, other), jnp.minimum(time, other)
    end = jnp.where(jax.random.bernoulli(key_instant, config.instants, time.shape), start, end)
    interval = jax.random.uniform(key_interval, (*time.shape, 2)) / 2 + jnp.array([0.0, 0.5])[None, None]
    return start, StepDraws(end, config.scale ** jax.random.uniform(key_scale, time.shape), interval)


def alpha_at(config: AlphaFlowConfig, part: Float[Array, ""]) -> Float[Array, ""]:
    """α after a part of the stage, 0..1: from 1 to the smallest along a sigmoid, centred in `anneal`."""
    if config.anneal == 0:
        return jnp.full_like(part, config.alpha)
    fall = jax.nn.sigmoid(STEEPNESS * (part / config.anneal - 0.5))
    return jnp.maximum(1 - fall, config.alpha)


def alpha_flow_loss(
    conditional: Velocity,
    unconditional: Velocity,
    latents: Latents,
    draws: Draws,
    steps: StepDraws,
    alpha: Float[Array, ""],
    config: AlphaFlowConfig,
    diffusion: DiffusionConfig,
) -> tuple[Float[Array, ""], Binned]:
    """The loss above, a mean over counted values; and the errors, times α, by the noise level of t.

    Gradients flow through u(z_t, r, t) alone.

    Args:
        conditional: the model with the condition; predicts `flow`.
        unconditional: without; read where `config.scale` is above 1.
        latents: see `progressive.Latents`.
        draws: time is t.
        steps: see `draw_steps`.
        alpha: α.
        config: see `AlphaFlowConfig`.
        diffusion: the flow model's objective.
    """
    x, noise, time = latents.clean, draws.noise, draws.time
    scale, interval = steps.scale, steps.interval
    sg = jax.lax.stop_gradient

    def wide(values):
        return latents.spread(values[..., None])

    def held(z, at):
        """What is observed stays on its own noise's path, as in sampling."""
        if latents.held is None:
            return z
        a, s = latents.levels(diffusion, at)
        return latents.held * (a * x + s * noise) + (1 - latents.held) * z

    between = alpha * steps.end + (1 - alpha) * time
    (a, sigma), (_, sigma_s), (_, sigma_r) = (latents.levels(diffusion, at) for at in (time, between, steps.end))
    z = a * x + sigma * noise
    instant = noise - x
    if config.scale > 1:
        none, always = jnp.ones_like(scale), jnp.stack([jnp.zeros_like(scale), jnp.ones_like(scale)], axis=-1)
        inside = (interval[..., 0] <= time) & (time <= interval[..., 1])
        ahead = sg(conditional(z, time, time, scale, interval) - unconditional(z, time, time, none, always))
        instant = instant + wide(jnp.where(inside, 1 - 1 / scale, 0)) * ahead
    has_length = wide((steps.end < time).astype(x.dtype))
    first = instant
    if config.velocity == "model":
        own = sg(conditional(z, time, between, scale, interval))
        first = has_length * own + (1 - has_length) * instant
    z_between = held(z - (sigma - sigma_s) * first, between)
    rest = sg(conditional(z_between, between, steps.end, scale, interval))
    # In a shifted schedule the parts of a step are not α and 1 − α of its length in σ.
    part = jnp.where(has_length > 0, (sigma - sigma_s) / jnp.maximum(sigma - sigma_r, 1e-6), 1.0)
    wanted = part * first + (1 - part) * rest
    error = jnp.square(conditional(z, time, steps.end, scale, interval) - sg(wanted)) * latents.counted
    by_level = binned(error, latents.counted, wide(time))
    error = error / (has_length * alpha + (1 - has_length))
    return error.sum() / jnp.maximum(latents.counted.sum(), 1), by_level
