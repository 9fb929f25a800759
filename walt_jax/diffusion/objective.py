"""The training objective: a weighted squared error of the prediction, with self-conditioning (Chen et al. 2022)."""

import dataclasses
import itertools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from walt_jax.config import Fraction
from walt_jax.diffusion.adaptive import adapted_time
from walt_jax.diffusion.learned_sigma import split_sigma, step_before, variational_loss
from walt_jax.diffusion.loss_weights import min_snr
from walt_jax.diffusion.motion_error import NO_MOTION, MotionConfig, motion_error
from walt_jax.diffusion.parameterization import Kind, clean, target
from walt_jax.diffusion.schedule import Schedule
from walt_jax.diffusion.times import TimesConfig, resolution_shift, sample_times

LEVELS = 4  # of noise that losses are logged for: quarters of diffusion time

# (noisy latents, each clip's time, estimate of the clean latents) -> prediction, maybe with `learned_sigma`'s v
Denoise = Callable[[Float[Array, "b n p"], Float[Array, "b s"], Float[Array, "b n p"]], Float[Array, "b n k"]]
Spread = Callable[[Float[Array, "b s k"]], Float[Array, "b n k"]]  # values of clips to their tokens
Clips = Callable[[Float[Array, "b n p"]], Float[Array, "b t h w c"]]  # tokens of equal clips as latents


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


@flax.struct.dataclass
class Draws:
    """What is random in a batch's loss; packs or clips are the leading axis.

    Attributes:
        time: of each clip, before `adapted_time`.
        noise: of each value.
        self_conditioned: whether a clip is conditioned on the model's first estimate; None where none is.
    """

    time: Float[Array, "b s"]
    noise: Float[Array, "b n p"]
    self_conditioned: Bool[Array, "b s"] | None


@flax.struct.dataclass
class Binned:
    """Sums of errors and how many values they are over, for each of `LEVELS` equal parts of diffusion time."""

    total: Float[Array, " k"]
    count: Float[Array, " k"]


def draw(key: PRNGKeyArray, latents: tuple[int, int, int], clips: tuple[int, int], config: DiffusionConfig) -> Draws:
    """What `diffusion_loss` needs for latents of the shape (b, n, p), with (b, s) clips."""
    key_time, key_noise, key_estimate = jax.random.split(key, 3)
    chosen = None
    if config.self_conditioning > 0:
        chosen = jax.random.bernoulli(key_estimate, config.self_conditioning, clips)
    return Draws(sample_times(config.times, key_time, clips), jax.random.normal(key_noise, latents), chosen)


def diffusion_loss(
    denoise: Denoise,
    latents: Float[Array, "b n p"],
    counted: Float[Array, "b n p"],
    tokens: Float[Array, "b s"],
    complexity: Float[Array, "b s"] | None,
    spread: Spread,
    draws: Draws,
    config: DiffusionConfig,
    clips: Clips | None = None,
    motion: MotionConfig = NO_MOTION,
) -> tuple[Float[Array, ""], Binned]:
    """The mean squared error over counted values, at one time for each clip; and the same errors by noise level.

    Args:
        denoise: the model.
        latents: clean, normalised to unit variance, as tokens.
        counted: 1 for each value with a loss, 0 for padding and observed values.
        tokens: of each clip, 0 where there is none.
        complexity: of each clip, see `adaptive`; read where `config.adaptive` is above 0.
        spread: values of clips to their tokens.
        draws: see `draw`. No gradient flows through a first estimate.
        config: see `DiffusionConfig`.
        clips: read where `config.multiscale` is above 0 or `motion` has weights; those errors are left out of the ones
            by noise level.
        motion: see `MotionConfig`.
    """
    time, noise = draws.time, draws.noise
    if config.adaptive > 0:
        time = adapted_time(config.schedule, time, complexity, config.adaptive)
    levels = config.schedule(time, config.shift(tokens))
    alpha, sigma = (spread(level[..., None]) for level in levels)
    noisy = alpha * latents + sigma * noise
    estimate, width = jnp.zeros_like(latents), latents.shape[-1]
    if config.self_conditioning > 0:
        first, _ = split_sigma(denoise(noisy, time, estimate), width)
        first = clean(config.parameterization, first, noisy, alpha, sigma)
        first = jnp.where(alpha + sigma > 0, first, 0)  # padding has no noise level
        chosen = draws.self_conditioned[..., None].astype(first.dtype)
        estimate = jax.lax.stop_gradient(spread(chosen) * first)
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
    by_level = binned(error * counted, counted, spread(time[..., None]))
    total = (error * counted).sum()
    for level in range(1, config.multiscale + 1):
        # A sum over all positions, like the others: each coarse value stands for a square of them.
        side = 2**level
        squares = reduce(clips(difference * counted), "b t (h s) (w r) c -> b t h w c", "mean", s=side, r=side)
        total = total + side * side**2 * jnp.square(squares).sum()
    total = total / 2**config.multiscale
    if motion.consistency or motion.smoothness:
        total = total + motion_error(clips(difference * counted), motion)
    return total / jnp.maximum(counted.sum(), 1), by_level


def binned(errors: Float[Array, "b n p"], counted: Float[Array, "b n p"], time: Float[Array, "b n 1"]) -> Binned:
    """Sums of errors over the clips of each part of diffusion time; no gradient flows."""
    errors, counted = (jax.lax.stop_gradient(values).sum(-1, keepdims=True) for values in (errors, counted))
    level = jnp.minimum(time * LEVELS, LEVELS - 1).astype(jnp.int32)
    own = (level == jnp.arange(LEVELS)[None, None]).astype(errors.dtype)
    return Binned((errors * own).sum((0, 1)), (counted * own).sum((0, 1)))


def level_names() -> list[str]:
    """Of the parts of diffusion time that losses are binned in: "noise_0_25", in percent, to "noise_75_100"."""
    bounds = [round(100 * level / LEVELS) for level in range(LEVELS + 1)]
    return [f"noise_{low}_{high}" for low, high in itertools.pairwise(bounds)]
