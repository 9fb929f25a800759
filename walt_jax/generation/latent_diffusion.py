"""Codec, text encoder and denoiser together: what the denoiser is conditioned on, and how videos are sampled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt, UInt8

from walt_jax.config import Positive
from walt_jax.denoiser.layout import Layout, from_tokens, to_tokens
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.diffusion import parameterization
from walt_jax.diffusion.guidance import GuidanceConfig, guide
from walt_jax.diffusion.learned_sigma import split_sigma
from walt_jax.diffusion.objective import Denoise, DiffusionConfig
from walt_jax.diffusion.sampler import Level, Predict, sample
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.parallel.rules import constrain
from walt_jax.text.frozen import Embedded
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD

# Captions of clips: token ids, or embeddings where the text encoder is not trained; or class labels, with m = 1.
TextTokens = Int[Array, "b s m"] | Embedded

Levels = Callable[[Float[Array, ""]], tuple[Level, Level]]  # α and σ at a time


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How videos are sampled.

    Attributes:
        steps: number of sampling steps.
        sampler: see `diffusion.sampler`; W.A.L.T's is "ddim".
        guidance: see `GuidanceConfig`; guidance doubles the cost: the model also runs without the condition.
        batch_size: clips sampled together.
    """

    steps: Positive
    sampler: Literal["ddpm", "ddim", "dpm++2m", "unipc", "euler", "heun"] = "ddim"
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    batch_size: Positive = 8


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The modules of a video diffusion model; parameters are passed to each method.

    Attributes:
        codec: pixels to latents and back.
        text: caption ids to embeddings; None where the denoiser is conditioned on labels, or on nothing.
        denoiser: predicts what `diffusion.parameterization` says.
        diffusion: see `DiffusionConfig`.
        latent_shape: (t, h, w, c) of a clip that is sampled.
        trains_text: whether the text encoder is trained with the denoiser; if not, all methods take its embeddings.
    """

    codec: Codec
    text: T5Encoder | None
    denoiser: Denoiser
    diffusion: DiffusionConfig
    latent_shape: tuple[int, int, int, int]
    trains_text: bool = True

    @property
    def layout(self) -> Layout:
        """Positions of the tokens of a clip of `latent_shape`."""
        return Layout(grid=self.denoiser.config.grid(self.latent_shape[:3]))

    def layout_of(self, latents: Float[Array, "b t h w c"]) -> Layout:
        """Positions of the tokens of clips of one size, which may differ from `latent_shape`."""
        return Layout(grid=self.denoiser.config.grid(latents.shape[1:4]))

    @property
    def low_res_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the low-resolution latents, for super-resolution."""
        t, h, w, c = self.latent_shape
        scale = self.denoiser.config.upscale
        return t, h // scale, w // scale, c

    def tokens(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b n p"]:
        """Latents as tokens: patches of latent positions, flattened."""
        return to_tokens(latents, self.denoiser.config.patch_size)

    def text_tokens(self, *shape: int) -> Int[Array, "*b m"] | Embedded:
        """Dummy captions of this shape, whose last axis counts text tokens."""
        ids = jnp.ones(shape, jnp.int32)
        if self.text is None or self.trains_text:
            return ids
        return Embedded(jnp.zeros((*shape, self.text.config.dim), self.text.config.dtype), ids != PAD)

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Fresh parameters of the denoiser, and of the text encoder if it is trained, with their logical axis names."""
        key_text, key_denoiser = jax.random.split(key)
        text_tokens, params = self.text_tokens(1, 1, 1), {}
        if self.text is not None and self.trains_text:
            params["text"] = self.text.init(key_text, text_tokens[0], text_tokens[0] != PAD)["params"]
        noisy = self.tokens(jnp.zeros((1, *self.latent_shape)))
        mask, time = self.tokens(jnp.zeros((1, *self.latent_shape[:3], 1))), jnp.zeros((1, 1))
        low_res = jnp.zeros((1, *self.low_res_shape))
        condition = self.condition(unboxed(params), text_tokens, noisy, mask, low_res, time)
        denoiser = self.denoiser.init(key_denoiser, noisy, time, condition, self.layout)
        return {**params, "denoiser": denoiser["params"]}

    def condition(
        self,
        params: dict[str, Any],
        text_tokens: TextTokens,
        observed: Float[Array, "b n p"] | None = None,
        mask: Float[Array, "b n q"] | None = None,
        low_res: Float[Array, "b t2 h2 w2 c"] | None = None,
        low_res_time: Float[Array, "b s"] | None = None,
    ) -> Condition:
        """What the denoiser is conditioned on.

        Args:
            params: structured as `init` returns them.
            text_tokens: captions or labels of the clips, see `TextTokens`.
            observed: clean latents as tokens; read if the denoiser predicts frames, like
            mask: as tokens, 1 for each observed latent position, 0 elsewhere.
            low_res: low-resolution latents with noise; read if the denoiser upscales, like
            low_res_time: the diffusion time of that noise, 0..1.
        """
        cfg, inputs = self.denoiser.config, {}
        if isinstance(text_tokens, Embedded):
            inputs = {"text": text_tokens.embeddings, "text_mask": text_tokens.mask}
        elif self.text is not None:
            ids = text_tokens.reshape(-1, text_tokens.shape[-1])
            embeddings = self.text.apply({"params": params["text"]}, ids, ids != PAD)
            inputs = {"text": embeddings.reshape(*text_tokens.shape, -1), "text_mask": text_tokens != PAD}
        elif cfg.classes:
            inputs = {"label": text_tokens[..., 0]}
        if cfg.frame_prediction:
            inputs |= {"observed": observed * self.per_value(mask), "observed_mask": mask}
        if cfg.upscale > 1:
            inputs |= {"low_res": low_res, "low_res_time": low_res_time}
        return Condition(**inputs)

    def per_value(self, mask: Float[Array, "b n q"]) -> Float[Array, "b n p"]:
        """A mask of latent positions, repeated for each channel."""
        return jnp.repeat(mask, self.latent_shape[3], axis=-1)

    def denoise(self, params: dict[str, Any], condition: Condition, layout: Layout) -> Denoise:
        """The denoiser with its condition fixed: a function of noisy latents, time and the last estimate."""

        def apply(noisy, time, estimate):
            return self.denoiser.apply({"params": params["denoiser"]}, noisy, time, condition, layout, estimate)

        return apply

    def predictor(
        self,
        params: dict[str, Any],
        text_tokens: Int[Array, "b m"] | Embedded,
        empty: Int[Array, " m"] | Embedded,
        config: SamplingConfig,
        observed: Float[Array, "b t h w c"],
        mask: Float[Array, "b t h w 1"],
        low_res: Float[Array, "b t h2 w2 c"] | None = None,
    ) -> tuple[Predict, Levels, Any]:
        """The guided denoiser of a batch of clips; arguments as those of `sample`.

        Returns:
            (predict, levels, carried) for `diffusion.sampler.sample`. What is carried first is ([the last estimate of
            each model, with the condition and without], v of `learned_sigma` or None).
        """
        layout, kind = self.layout, self.diffusion.parameterization
        clean, where, low_res_time = self.tokens(observed), self.tokens(mask), jnp.zeros((observed.shape[0], 1))
        condition = self.condition(params, single_clips(text_tokens), clean, where, low_res, low_res_time)
        models = [self.denoise(params, condition, layout)]
        if config.guidance.needs_unconditional:
            free = jax.tree.map(
                lambda one, all_of_them: jnp.broadcast_to(one[None], all_of_them.shape), empty, text_tokens
            )
            # Without caption and without observed frames: guidance is on both.
            nothing = jnp.zeros_like(clean), jnp.zeros_like(where)
            condition = self.condition(params, single_clips(free), *nothing, low_res, low_res_time)
            models.append(self.denoise(params, condition, layout))
        tokens = jnp.full((1, 1), clean.shape[1])

        def levels(time):
            return tuple(
                level[..., None] for level in self.diffusion.schedule(time[None, None], self.diffusion.shift(tokens))
            )

        pinned = self.per_value(where)
        channel = jnp.arange(clean.shape[-1]) % self.latent_shape[3]

        def predict(z, time, carried):
            # Self-conditioning: each model gets its own last estimate, as in training.
            times, level = jnp.full((z.shape[0], 1), time), levels(time)
            outputs = [model(z, times, estimate) for model, estimate in zip(models, carried[0], strict=True)]
            split_outputs = [split_sigma(output, z.shape[-1]) for output in outputs]
            estimates = [parameterization.clean(kind, prediction, z, *level) for prediction, _ in split_outputs]
            guided = estimates[0]
            if len(models) > 1:
                guided = guide(config.guidance, time, *estimates)
                if config.guidance.channels:
                    guided = jnp.where(channel[None, None] < config.guidance.channels, guided, estimates[0])
            # The clean latents of observed positions are known, so their noise stays that of training at each time.
            guided = pinned * clean + (1 - pinned) * guided
            return guided, (estimates, split_outputs[0][1])

        none = jnp.zeros_like(clean)
        return predict, levels, ([none for _ in models], none if self.denoiser.config.learned_sigma else None)

    @functools.partial(jax.jit, static_argnums=(0, 6))
    def sample(
        self,
        params: dict[str, Any],
        tokenizer: TrainedTokenizer,
        text_tokens: Int[Array, "b m"] | Embedded,
        empty: Int[Array, " m"] | Embedded,
        seeds: UInt[Array, " b"],
        config: SamplingConfig,
        observed: Float[Array, "b t h w c"] | None = None,
        mask: Float[Array, "b t h w 1"] | None = None,
        low_res: Float[Array, "b t h2 w2 c"] | None = None,
    ) -> UInt8[Array, "b t h w 3"]:
        """Samples videos, uint8.

        Args:
            params: structured as `init` returns them.
            tokenizer: the codec's trained variables.
            text_tokens: a caption or a label for each video.
            empty: the empty caption or label, for guidance.
            seeds: one for each video; its randomness depends on its own seed only.
            config: see `SamplingConfig`.
            observed: normalised latents of observed frames, if the denoiser predicts frames; the result has them
                unchanged.
            mask: 1 at observed latent positions, 0 elsewhere.
            low_res: normalised low-resolution latents, if the denoiser upscales.
        """
        layout = self.layout
        keys = jax.vmap(jax.random.key)(seeds)
        noise = self.tokens(jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys))
        noise = constrain(noise, "batch", "tokens")
        if observed is None:
            observed, mask = (jnp.zeros((len(noise), *self.latent_shape[:3], c)) for c in (self.latent_shape[3], 1))
        predict, levels, carried = self.predictor(params, text_tokens, empty, config, observed, mask, low_res)
        learns = self.denoiser.config.learned_sigma
        learned = (lambda carried: carried[1]) if learns else None
        key = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        latents = sample(config.sampler, predict, noise, levels, config.steps, key, carried, learned)
        latents = from_tokens(latents, layout.grid, self.denoiser.config.patch_size)
        latents = mask * observed + (1 - mask) * latents
        return self.codec.decode(tokenizer, latents)[0]


def single_clips(text_tokens: Int[Array, "b m"] | Embedded) -> TextTokens:
    """Captions of a batch without packs, where a row has one clip."""
    return jax.tree.map(lambda array: array[:, None], text_tokens)


def unboxed(params: Any) -> Any:
    """Parameters without their logical axis names, divided as they are."""

    def plain(leaf: Any) -> Any:
        # Flax's own unboxing would put all of a parameter on each device where a mesh is in context.
        return leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.Partitioned) else leaf

    return jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
