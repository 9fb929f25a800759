"""The training objective: a weighted squared error of the prediction, with self-conditioning (Chen et al. 2022)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from walt_jax.config import Fraction
from walt_jax.diffusion.adaptive import adapted_time
from walt_jax.diffusion.learned_sigma import split_sigma, step_before, variational_loss
from walt_jax.diffusion.loss_weights import min_snr
from walt_jax.diffusion.parameterization import Kind, clean, target
from walt_jax.diffusion.schedule import Schedule
from walt_jax.diffusion.times import TimesConfig, resolution_shift, sample_times

# (noisy latents, each clip's time, estimate of the clean latents) -> prediction, maybe with `learned_sigma`'s v
Denoise = Callable[[Float[Array, "b n p"], Float[Array, "b s"], Float[Array, "b n p"]], Float[Array, "b n k"]]
Spread = Callable[[Float[Array, "b s k"]], Float[Array, "b n k"]]  # values of clips to their tokens
Coarse = Callable[[Float[Array, "b n p"], int], Float[Array, "b *m"]]  # values averaged over squares of so many


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The objective.

    Attributes:
        schedule: see `Schedule`; W.A.L.T's is "linear" with zero terminal SNR.
        parameterization: what the model predicts: "v" (W.A.L.T), "eps", "x0", or "flow", ε - x.
        times: which times are trained on.
        self_conditioning: probability that a clip is conditioned on the model's own first estimate; W.A.L.T: 0.9.
        base_tokens: where above 0, a clip of n tokens has its noise shifted by √(n / base_tokens), in training and
            sampling (SD3).
        min_snr: where above 0, γ of min-SNR-γ weights; 5 in the paper.
        multiscale: the loss is also taken of errors averaged over squares of 2, 4, … 2^multiscale latent positions,
            each with twice the weight of the finer one (simple diffusion, Hoogeboom et al. 2023).
        adaptive: how far a clip's detail and motion raise its training noise, see `adaptive`; 0 is off.
    """

    schedule: Schedule
    parameterization: Kind = "v"
    times: TimesConfig = dataclasses.field(default_factory=TimesConfig)
    self_conditioning: Fraction = 0.0
    base_tokens: int = 0
    min_snr: float = 0.0
    multiscale: int = 0
    adaptive: float = 0.0

    def __post_init__(self):
        if self.parameterization == "eps" and self.schedule.terminal_snr_is_zero:
            raise ValueError(
                "parameterization='eps' does not determine the clean latents where there is only noise; "
                "set schedule.zero_terminal_snr=False, or predict v"
            )

    def shift(self, tokens: Float[Array, "b s"]) -> Float[Array, "b s"] | None:
        """The schedule's shift for clips of so many tokens."""
        return resolution_shift(tokens, self.base_tokens) if self.base_tokens else None


def diffusion_loss(
    denoise: Denoise,
    latents: Float[Array, "b n p"],
    counted: Float[Array, "b n p"],
    tokens: Float[Array, "b s"],
    complexity: Float[Array, "b s"] | None,
    spread: Spread,
    key: PRNGKeyArray,
    config: DiffusionConfig,
    coarse: Coarse | None = None,
) -> Float[Array, ""]:
    """The mean squared error over counted values, at one random time for each clip.

    Args:
        denoise: the model.
        latents: clean, normalised to unit variance, as tokens.
        counted: 1 for each value with a loss, 0 for padding and observed values.
        tokens: of each clip, 0 where there is none.
        complexity: of each clip, see `adaptive`; read where `config.adaptive` is above 0.
        spread: values of clips to their tokens.
        key: draws times, noise and which clips are self-conditioned. No gradient flows through a first estimate.
        config: see `DiffusionConfig`.
        coarse: read where `config.multiscale` is above 0.
    """
    key_time, key_noise, key_estimate = jax.random.split(key, 3)
    time = sample_times(config.times, key_time, tokens.shape)
    if config.adaptive > 0:
        time = adapted_time(config.schedule, time, complexity, config.adaptive)
    levels = config.schedule(time, config.shift(tokens))
    alpha, sigma = (spread(level[..., None]) for level in levels)
    noise = jax.random.normal(key_noise, latents.shape)
    noisy = alpha * latents + sigma * noise
    estimate, width = jnp.zeros_like(latents), latents.shape[-1]
    if config.self_conditioning > 0:
        first, _ = split_sigma(denoise(noisy, time, estimate), width)
        first = clean(config.parameterization, first, noisy, alpha, sigma)
        first = jnp.where(alpha + sigma > 0, first, 0)  # padding has no noise level
        chosen = jax.random.bernoulli(key_estimate, config.self_conditioning, tokens.shape)
        estimate = jax.lax.stop_gradient(spread(chosen[..., None].astype(first.dtype)) * first)
    wanted = target(config.parameterization, latents, noise, alpha, sigma)
    prediction, v = split_sigma(denoise(noisy, time, estimate), width)
    difference = prediction - wanted
    error = jnp.square(difference)
    if config.min_snr > 0:
        error = error * spread(min_snr(config.parameterization, *levels, config.min_snr)[..., None])
    if v is not None:
        shift, miss = config.shift(tokens), latents - clean(config.parameterization, prediction, noisy, alpha, sigma)
        here, before = (
            # Padding has no level: any that can be divided by.
            tuple(jnp.where(alpha + sigma > 0, spread(level[..., None]), 0.5) for level in config.schedule(t, shift))
            for t in step_before(time)
        )
        error = error + variational_loss(v, miss, here, before)
    total = (error * counted).sum()
    for level in range(1, config.multiscale + 1):
        # A sum over all positions, like the others: each coarse value stands for a square of them.
        total = total + 2**level * 4**level * jnp.square(coarse(difference * counted, 2**level)).sum()
    return total / 2**config.multiscale / jnp.maximum(counted.sum(), 1)
