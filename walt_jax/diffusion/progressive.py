"""Progressive distillation (Salimans and Ho 2022): one DDIM step of a student is trained to be two of its teacher."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.diffusion.guidance import GuidanceConfig, guide
from walt_jax.diffusion.learned_sigma import split_sigma
from walt_jax.diffusion.loss_weights import min_snr
from walt_jax.diffusion.objective import Binned, Denoise, DiffusionConfig, Draws, Spread, binned
from walt_jax.diffusion.parameterization import clean, target

Levels = tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]


@dataclasses.dataclass(frozen=True)
class Latents:
    """The clips that are trained on, as tokens.

    Attributes:
        clean: normalised latents.
        counted: 1 for each value with a loss, 0 for padding and observed values.
        held: 1 for each value that is observed, which a sampler holds; None where nothing is.
        tokens: of each clip.
        spread: values of clips to their tokens.
    """

    clean: Float[Array, "b n p"]
    counted: Float[Array, "b n p"]
    held: Float[Array, "b n p"] | None
    tokens: Float[Array, "b s"]
    spread: Spread

    def levels(self, config: DiffusionConfig, time: Float[Array, "b s"]) -> Levels:
        """α and σ of each token at its clip's time; of padding 0 and 1, which can be divided by."""
        alpha, sigma = (self.spread(level[..., None]) for level in config.schedule(time, config.shift(self.tokens)))
        there = alpha + sigma > 0
        return jnp.where(there, alpha, 0), jnp.where(there, sigma, 1)


def ddim_step(z: Array, x: Array, here: Levels, there: Levels) -> Float[Array, "b n p"]:
    """From one noise level to another as if x were the clean latents, as `sampler.TimeGrid.step`."""
    ratio = there[1] / here[1]
    return ratio * z + (there[0] - ratio * here[0]) * x


def two_steps_in_one(z: Array, z_after: Array, here: Levels, after: Levels) -> Float[Array, "b n p"]:
    """x̃ for which one DDIM step leads from z to where two have led (algorithm 2, "teacher x̂ target")."""
    ratio = after[1] / here[1]
    return (z_after - ratio * z) / (after[0] - ratio * here[0])


def distillation_loss(
    student: Denoise,
    teacher: Sequence[Denoise],
    latents: Latents,
    draws: Draws,
    steps: int,
    guidance: GuidanceConfig,
    config: DiffusionConfig,
) -> tuple[Float[Array, ""], Binned]:
    """The error of the student's prediction against that which two guided steps of the teacher amount to.

    Times are the ends of the student's steps, `draws.time` rounded up to them. Where a clip is self-conditioned, an
    evaluation gets the estimate of the step before it, at that step's noise level, as in sampling; the first step has
    none.

    Args:
        student: the model that is trained.
        teacher: the frozen one with the condition and, where `guidance` needs it, without.
        latents: see `Latents`.
        draws: see `objective.draw`.
        steps: how many the student will sample in; the teacher takes twice as many.
        guidance: the teacher's, which the student learns with it.
        config: the objective, of both.
    """
    kind, width, x = config.parameterization, latents.clean.shape[-1], latents.clean
    time = jnp.ceil(draws.time * steps) / steps
    half, after = time - 0.5 / steps, jnp.maximum(time - 1 / steps, 0)  # an exact 0 for the last step

    def noisy(time):
        alpha, sigma = latents.levels(config, time)
        return alpha * x + sigma * draws.noise

    def estimated(model, z, time, estimate):
        prediction, _ = split_sigma(model(z, time, estimate), width)
        return clean(kind, prediction, z, *latents.levels(config, time))

    def before(model, stride):
        """The estimate that a model carries from the step before, where there is one."""
        if config.self_conditioning == 0 or steps == 1:
            return jnp.zeros_like(x)
        earlier = jnp.minimum(time + stride, 1)
        found = estimated(model, noisy(earlier), earlier, jnp.zeros_like(x))
        carried = draws.self_conditioned & (time < 1)
        return latents.spread(carried[..., None].astype(x.dtype)) * found

    def guided(estimates, time):
        found = guide(guidance, latents.spread(time[..., None]), *estimates) if len(teacher) > 1 else estimates[0]
        return found if latents.held is None else latents.held * x + (1 - latents.held) * found

    z, here, end = noisy(time), latents.levels(config, time), latents.levels(config, after)
    first = [estimated(model, z, time, before(model, 0.5 / steps)) for model in teacher]
    z_half = ddim_step(z, guided(first, time), here, latents.levels(config, half))
    second = [estimated(model, z_half, half, own) for model, own in zip(teacher, first, strict=True)]
    z_after = ddim_step(z_half, guided(second, half), latents.levels(config, half), end)
    wanted = two_steps_in_one(z, z_after, here, end)
    wanted = target(kind, wanted, (z - here[0] * wanted) / here[1], *here)

    own = jax.lax.stop_gradient(before(student, 1 / steps))
    prediction, _ = split_sigma(student(z, time, own), width)
    error = jnp.square(prediction - jax.lax.stop_gradient(wanted))
    if config.min_snr > 0:
        weight = min_snr(kind, *config.schedule(time, config.shift(latents.tokens)), config.min_snr)
        error = error * latents.spread(weight[..., None])
    error = error * latents.counted
    by_level = binned(error, latents.counted, latents.spread(time[..., None]))
    return error.sum() / jnp.maximum(latents.counted.sum(), 1), by_level
