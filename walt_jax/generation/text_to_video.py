"""The models together: how captions condition the denoiser, how latents are normalised, how video is sampled."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt, UInt8

from walt_jax.config import Positive
from walt_jax.denoiser.model import Denoiser
from walt_jax.diffusion.objective import Denoise
from walt_jax.diffusion.sampler import ddim
from walt_jax.diffusion.schedule import schedule
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD
from walt_jax.tokenizer.autoencoder import Tokenizer


def to_float(video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """0..255 to -1..1."""
    return video.astype(jnp.float32) / 127.5 - 1


def to_uint8(video: Float[Array, "b t h w 3"]) -> UInt8[Array, "b t h w 3"]:
    """-1..1 to 0..255, rounded; what is outside is clipped."""
    return jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class TrainedTokenizer(flax.struct.PyTreeNode):
    """A tokenizer's weights and the statistics of its latents over training clips, per channel."""

    params: Any
    mean: Float[Array, " c"]
    std: Float[Array, " c"]


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
        tokenizer: pixels to latents and back.
        text: caption ids to embeddings.
        denoiser: predicts v.
        schedule: its name in `diffusion.schedule`.
        latent_shape: (t, h, w, c) of a clip.
    """

    tokenizer: Tokenizer
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

    def encode(self, tokenizer: TrainedTokenizer, video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 c"]:
        """Normalised latents."""
        latents = self.tokenizer.apply({"params": tokenizer.params}, to_float(video), method="encode")
        return normalise(latents, tokenizer)

    def reconstruct(self, tokenizer: TrainedTokenizer, video: UInt8[Array, "b t h w 3"]) -> UInt8[Array, "b t h w 3"]:
        """Video through the tokenizer and back."""
        return to_uint8(self.tokenizer.apply({"params": tokenizer.params}, to_float(video))[0])

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
            tokenizer: decodes, and un-normalises.
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
        latents = latents * along_channels(tokenizer.std) + along_channels(tokenizer.mean)
        return to_uint8(self.tokenizer.apply({"params": tokenizer.params}, latents, method="decode"))


def along_channels(statistic: Float[Array, " c"]) -> Float[Array, "1 1 1 1 c"]:
    return statistic[None, None, None, None]


def normalise(latents: Float[Array, "b t h w c"], tokenizer: TrainedTokenizer) -> Float[Array, "b t h w c"]:
    return (latents - along_channels(tokenizer.mean)) / along_channels(tokenizer.std)


def unboxed(params: Any) -> Any:
    """Parameters without their logical axis names."""
    return nn.meta.unbox(params)
