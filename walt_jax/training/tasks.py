"""What a stage trains. A task knows parameters and gradients; the loop knows the rest."""

import dataclasses
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from walt_jax.config import Fraction, Positive, Range
from walt_jax.denoiser.layout import Layout
from walt_jax.diffusion.adaptive import complexity
from walt_jax.diffusion.objective import diffusion_loss
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion

Metrics = dict[str, Float[Array, ""]]


class Task(Protocol):
    """What the loop needs."""

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        """Parameters with their logical axis names, `nn.Partitioned`, and what moves without a gradient."""

    def gradients(
        self, params: Any, moving: Any, frozen: Any, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Any, Any, Metrics]:
        """Gradients like `params`, what moves as it is after the step, and scalars to log, "loss" among them.

        `frozen` is what the stages before have trained.
        """

    def served(self, params: Any, moving: Any) -> Any:
        """The part of both that the trained model needs."""

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        """Fresh parameters with an earlier stage's `served` put into them."""


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """What a denoiser that predicts frames or upscales is trained to be given.

    Attributes:
        frames: latent frames at a clip's start that may be given, each as often: 1 is image to video, 2 is W.A.L.T's
            video prediction.
        probability: that a clip is given any, W.A.L.T's p_fp.
        low_noise: the low-resolution latents get noise of a time between 0 and this, t_max of W.A.L.T.
    """

    frames: tuple[Positive, ...] = ()
    probability: Fraction = 0.0
    low_noise: Annotated[float, Range(0, 1)] = 0.0


@dataclasses.dataclass(frozen=True)
class DenoiserTask:
    """W.A.L.T on the frozen tokenizer's latents.

    A batch has clips to be encoded, `video`; or latents, `latents`; or packs, `tokens` and `pack`. Beside it the
    clips' captions or labels, `text`, a row each: `[b, m]`, of packs `[b, s, m]`.

    Attributes:
        model: see `LatentDiffusion`.
        conditioning: see `ConditioningConfig`.
    """

    model: LatentDiffusion
    conditioning: ConditioningConfig

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        return self.model.init(key), {}

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: TrainedTokenizer,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
    ) -> tuple[Any, Any, Metrics]:
        """The diffusion loss's, over values of clips that are not given."""
        key_given, key_low, key_loss = jax.random.split(key, 3)
        model, energy = self.model, None
        if "pack" in batch:
            layout, tokens, ids = Layout(pack=batch["pack"]), batch["tokens"], batch["text"]
        else:
            latents = batch["latents"] if "latents" in batch else model.codec.encode(frozen, batch["video"])[0]
            layout, tokens, ids = model.layout, model.tokens(latents), batch["text"][:, None]
            if model.diffusion.adaptive > 0:
                energy = complexity(latents)[:, None]
        clips = ids.shape[:2]
        sizes = jnp.broadcast_to(layout.clip_sizes(), (*clips, 3))
        counted = jnp.broadcast_to(layout.valid()[..., None], tokens.shape).astype(tokens.dtype)
        given = {}
        if model.denoiser.config.frame_prediction:
            mask = self._given(layout, tokens, clips, key_given)
            given = {"known": tokens, "mask": mask}
            counted = counted * (1 - model.per_value(mask))
        if model.denoiser.config.upscale > 1:
            given["low"], given["low_time"] = self._low(frozen, batch["video"], key_low)

        def loss(params):
            denoise = model.denoise(params, model.condition(params, ids, **given), layout)
            return diffusion_loss(
                denoise, tokens, counted, sizes.prod(-1), energy, layout.spread, key_loss, model.diffusion
            )

        value, gradients = jax.value_and_grad(loss)(params)
        metrics = {"loss": value}
        if layout.pack is not None:
            metrics["tokens_valid_fraction"] = layout.valid().mean()
        return gradients, moving, metrics

    def served(self, params: Any, moving: Any) -> Any:
        return params

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        return served, moving

    def _given(
        self, layout: Layout, tokens: Float[Array, "b n p"], clips: tuple[int, int], key: PRNGKeyArray
    ) -> Float[Array, "b n q"]:
        """1 for the latent positions at each clip's start that are given."""
        key_frames, key_whether = jax.random.split(key)
        count = jax.random.choice(key_frames, jnp.array(self.conditioning.frames), clips)
        count = count * jax.random.bernoulli(key_whether, self.conditioning.probability, clips)
        frame = layout.coordinates()[..., :1]
        mask = (frame < layout.spread(count[..., None].astype(jnp.float32))).astype(jnp.float32)
        positions = tokens.shape[-1] // self.model.latent_shape[3]
        return jnp.broadcast_to(mask, (*tokens.shape[:2], positions))

    def _low(
        self, frozen: TrainedTokenizer, video: UInt8[Array, "b t h w 3"], key: PRNGKeyArray
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], Float[Array, "b 1"]]:
        """The clip at low resolution, encoded and noised, and how much noise that was."""
        scale = self.model.denoiser.config.upscale
        batch, frames, height, width, _ = video.shape
        small = video.astype(jnp.float32).reshape(batch, frames, height // scale, scale, width // scale, scale, 3)
        latents, _ = self.model.codec.encode(frozen, jnp.round(small.mean(axis=(3, 5))).astype(jnp.uint8))
        key_time, key_noise = jax.random.split(key)
        time = jax.random.uniform(key_time, (batch, 1), maxval=self.conditioning.low_noise)
        alpha, sigma = (level[..., None, None, None] for level in self.model.diffusion.schedule(time))
        return alpha * latents + sigma * jax.random.normal(key_noise, latents.shape), time
