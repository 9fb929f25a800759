"""The models together: how captions condition the denoiser, how latents are normalised, how video is sampled."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt, UInt8

from walt_jax.config import Positive
from walt_jax.denoiser.model import Denoiser
from walt_jax.diffusion.objective import Denoise
from walt_jax.diffusion.sampler import ddim
from walt_jax.diffusion.schedule import schedule
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn.

    Attributes:
        steps: DDIM's, each one evaluation with the caption and one without.
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: most clips sampled at once.
    """

    steps: Positive
    guidance: float
    batch_size: Positive = 8


@dataclasses.dataclass(frozen=True)
class TextToVideo:
    """The modules; parameters are passed to each method.

    Attributes:
        codec: pixels to latents and back.
        text: caption ids to embeddings.
        denoiser: predicts v.
        schedule: its name in `diffusion.schedule`.
        latent_shape: (t, h, w, c) of a clip.
    """

    codec: Codec
    text: T5Encoder
    denoiser: Denoiser
    schedule: str
    latent_shape: tuple[int, int, int, int]

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Parameters of the text encoder and the denoiser, with their logical axis names."""
        key_text, key_denoiser = jax.random.split(key)
        ids, time = jnp.ones((1, 1), jnp.int32), jnp.zeros((1,))
        embeddings, text = self.text.init_with_output(key_text, ids, ids != PAD)
        latents = jnp.zeros((1, *self.latent_shape))
        denoiser = self.denoiser.init(key_denoiser, latents, time, embeddings, ids != PAD)
        return {"text": text["params"], "denoiser": denoiser["params"]}

    def denoise(self, params: dict[str, Any], ids: Int[Array, "b n"]) -> Denoise:
        """The denoiser, conditioned on captions."""
        mask = ids != PAD
        embeddings = self.text.apply({"params": params["text"]}, ids, mask)

        def apply(noisy, time, estimate):
            return self.denoiser.apply({"params": params["denoiser"]}, noisy, time, embeddings, mask, estimate)

        return apply

    @functools.partial(jax.jit, static_argnums=(0, 6))
    def sample(
        self,
        params: dict[str, Any],
        tokenizer: TrainedTokenizer,
        ids: Int[Array, "b n"],
        empty: Int[Array, " n"],
        seeds: UInt[Array, " b"],
        config: SamplingConfig,
    ) -> UInt8[Array, "b t h w 3"]:
        """Videos of captions.

        Args:
            params: of `init`'s structure.
            tokenizer: what the codec has learned.
            ids: the captions.
            empty: the empty caption, for guidance.
            seeds: one a clip; a clip's noise depends on its own seed alone.
            config: see `SamplingConfig`.
        """
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), self.latent_shape))(seeds)
        conditional, unconditional = self.denoise(params, ids), None
        if config.guidance != 1:
            unconditional = self.denoise(params, jnp.broadcast_to(empty[None], ids.shape))
        latents = ddim(conditional, noise, schedule(self.schedule), config.steps, unconditional, config.guidance)
        return self.codec.decode(tokenizer, latents)[0]


def unboxed(params: Any) -> Any:
    """Parameters without their logical axis names."""
    return nn.meta.unbox(params)
