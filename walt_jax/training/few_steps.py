"""Stages after which fewer sampling steps do: they start from a trained denoiser."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from walt_jax.config import Positive
from walt_jax.denoiser.model import Step
from walt_jax.diffusion.alpha_flow import AlphaFlowConfig, StepDraws, alpha_at, alpha_flow_loss, draw_steps
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import Binned, Draws
from walt_jax.diffusion.progressive import Latents, distillation_loss
from walt_jax.generation.latent_diffusion import LatentDiffusion, TextTokens, unboxed
from walt_jax.text.frozen import Embedded
from walt_jax.text.vocabulary import EOS, PAD
from walt_jax.training.tasks import DenoiserTask, Drawn, Inputs

TEACHER = "teacher"  # in what a stage keeps and does not train


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Progressive distillation (Salimans and Ho 2022): the stage starts from its teacher and halves its steps.

    Attributes:
        steps: of DDIM, in which the student will sample; the teacher takes twice as many.
        guidance: the teacher's, which the student learns with it, so that it is sampled at scale 1 itself. A teacher
            that is a student itself has none.
    """

    steps: Positive
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)


@dataclasses.dataclass(frozen=True)
class DistillationTask(DenoiserTask):
    """A student of the denoiser that it starts from, which stays in `moving`, so that checkpoints hold it.

    Attributes:
        distillation: see `DistillationConfig`.
    """

    distillation: DistillationConfig

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        params = self.model.init(key)
        return params, {TEACHER: unboxed(params)}

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        params, _ = super().start(params, moving, served)
        # Copies: a step donates its state, and a buffer can be donated once only.
        return params, {TEACHER: jax.tree.map(jnp.copy, params)}

    def loss(
        self, params: Any, moving: Any, inputs: Inputs, draws: Drawn, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Binned]:
        """The error of the student's step against two of the teacher; and errors by noise level."""
        model, teacher, guidance = self.model, moving[TEACHER], self.distillation.guidance
        text, conditions, held = inputs.text, inputs.conditions, None
        if draws.observed is not None:
            held = model.per_value(draws.observed)
        teachers = [(text, conditions)]
        if guidance.needs_unconditional:
            teachers.append((without_captions(model, text), without_frames(conditions)))

        def denoise(params, text, conditions):
            return model.denoise(params, model.condition(params, text, **conditions), inputs.layout)

        latents = Latents(inputs.tokens, inputs.counted, held, inputs.sizes.prod(-1), inputs.layout.spread)
        return distillation_loss(
            denoise(params, text, conditions),
            [denoise(teacher, *way) for way in teachers],
            latents,
            draws.loss,
            self.distillation.steps,
            guidance,
            model.diffusion,
        )


@flax.struct.dataclass
class MeanVelocityDrawn(Drawn):
    """What is random about a batch, and about the steps of its clips."""

    steps: StepDraws | None = None


@dataclasses.dataclass(frozen=True)
class MeanVelocityTask(DenoiserTask):
    """A flow model that learns mean velocities, see `diffusion.alpha_flow`.

    Attributes:
        alpha_flow: see `AlphaFlowConfig`.
        steps: of the stage, in which α falls.
    """

    alpha_flow: AlphaFlowConfig
    steps: int

    def draw(self, batch: Any, key: PRNGKeyArray) -> MeanVelocityDrawn:
        drawn = super().draw(batch, key)
        loss, key_steps = drawn.loss, jax.random.fold_in(key, 1)
        time, steps = draw_steps(key_steps, loss.time, self.model.diffusion.times, self.alpha_flow)
        loss = Draws(time, loss.noise, loss.self_conditioned)
        return MeanVelocityDrawn(loss, drawn.observed, drawn.low_res, steps)

    def loss(
        self, params: Any, moving: Any, inputs: Inputs, draws: MeanVelocityDrawn, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Binned]:
        """See `alpha_flow_loss`."""
        model, held = self.model, None
        if draws.observed is not None:
            held = model.per_value(draws.observed)

        def velocity(text, conditions):
            denoise = model.denoise(params, model.condition(params, text, **conditions), inputs.layout)
            return lambda z, time, end, scale, interval: denoise(z, time, None, Step(end, scale, interval))

        return alpha_flow_loss(
            velocity(inputs.text, inputs.conditions),
            velocity(without_captions(model, inputs.text), without_frames(inputs.conditions)),
            Latents(inputs.tokens, inputs.counted, held, inputs.sizes.prod(-1), inputs.layout.spread),
            draws.loss,
            draws.steps,
            alpha_at(self.alpha_flow, jnp.asarray(step, jnp.float32) / self.steps),
            self.alpha_flow,
            model.diffusion,
        )


def without_captions(model: LatentDiffusion, text: TextTokens) -> TextTokens:
    """The empty caption or label for each clip, for guidance.

    Raises:
        ValueError: of embeddings, of which that of the empty caption is not known here.
    """
    if isinstance(text, Embedded):
        raise ValueError("guidance in training needs a text encoder that is trained with the denoiser")
    if model.text is None:
        return jnp.full_like(text, model.denoiser.config.classes)
    return jnp.full_like(text, PAD).at[..., 0].set(EOS)


def without_frames(conditions: dict[str, Array]) -> dict[str, Array]:
    """Arguments of `LatentDiffusion.condition` without what is observed."""
    unobserved = {name: jnp.zeros_like(conditions[name]) for name in ("observed", "mask") if name in conditions}
    return {**conditions, **unobserved}
