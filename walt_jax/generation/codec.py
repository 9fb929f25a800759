"""Applies a trained tokenizer: clips to latents or codes and back, and videos of any length in chunks."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from walt_jax.layers import along_channels
from walt_jax.parallel.rules import constrain
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from walt_jax.tokenizer.convolution import Cache

CHUNK_LATENTS = 4  # latent frames of a chunk when a video is streamed


def to_float(video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """0..255 to -1..1."""
    return video.astype(jnp.float32) / 127.5 - 1


def to_uint8(video: Float[Array, "b t h w 3"]) -> UInt8[Array, "b t h w 3"]:
    """-1..1 to 0..255, rounded; values outside are clipped."""
    return jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class PerFrame:
    """An image autoencoder with the tokenizer's interface: frames are encoded independently, so the cache is unused.

    Attributes:
        model: Stable Diffusion's autoencoder, which DiT and Latte use.
    """

    model: AutoencoderKL

    @property
    def config(self) -> AutoencoderKLConfig:
        """The autoencoder's config."""
        return self.model.config

    def apply(self, variables: Any, x: Array, cache: Cache = None, method: str = "encode") -> tuple[Array, Cache]:
        """As `Tokenizer.apply`, for chunks of any length."""
        return self.model.apply(variables, x, method=method), cache


class TrainedTokenizer(flax.struct.PyTreeNode):
    """A tokenizer's variables, and mean and standard deviation of its latents per channel, over training clips."""

    variables: Any
    mean: Float[Array, " c"]
    std: Float[Array, " c"]

    @classmethod
    def unnormalised(cls, variables: Any, channels: int) -> Self:
        """With statistics that leave latents as the encoder outputs them."""
        return cls(variables, jnp.zeros(channels), jnp.ones(channels))


@dataclasses.dataclass(frozen=True)
class Codec:
    """The tokenizer's module; its trained variables are passed to each method.

    The latents that go in and out are normalised: each channel has mean 0 and variance 1 over training clips.
    """

    tokenizer: Tokenizer | PerFrame

    @property
    def codes(self) -> tuple[int, ...]:
        """Number of codes of each group of the head; empty where latents are continuous."""
        if isinstance(self.tokenizer, PerFrame):
            return ()
        config = self.tokenizer.config
        return tuple(config.head.group_codes(config.latent_channels))

    @functools.partial(jax.jit, static_argnums=0)
    def encode(
        self, trained: TrainedTokenizer, video: UInt8[Array, "b t h w 3"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], Cache]:
        """Normalised latents of a clip, or of one of its chunks, with the cache that the chunk before returned."""
        video = constrain(to_float(video), "batch")
        latents, cache = self.tokenizer.apply(trained.variables, video, cache, method="encode")
        return (latents - along_channels(trained.mean)) / along_channels(trained.std), cache

    @functools.partial(jax.jit, static_argnums=0)
    def decode(
        self, trained: TrainedTokenizer, latents: Float[Array, "b t2 h2 w2 c"], cache: Cache = None
    ) -> tuple[UInt8[Array, "b t h w 3"], Cache]:
        """The clip of normalised latents; chunks as in `encode`."""
        latents = constrain(latents, "batch") * along_channels(trained.std) + along_channels(trained.mean)
        video, cache = self.tokenizer.apply(trained.variables, latents, cache, method="decode")
        return to_uint8(video), cache

    @functools.partial(jax.jit, static_argnums=0)
    def tokenize(self, trained: TrainedTokenizer, video: UInt8[Array, "b t h w 3"]) -> Int[Array, "b t2 h2 w2 g"]:
        """Codes of a clip; only for heads with codes."""
        return self.tokenizer.apply(trained.variables, to_float(video), method="tokenize")[0]

    @functools.partial(jax.jit, static_argnums=0)
    def decode_long(
        self, trained: TrainedTokenizer, latents: Float[Array, "b t2 h2 w2 c"]
    ) -> UInt8[Array, "b t h w 3"]:
        """As `decode`, but latent frames are decoded sequentially, so that activations take the memory of one.

        A scan over latent frames writes into one preallocated array.
        """
        stride = self.tokenizer.config.strides[0]
        first, cache = self.decode(trained, latents[:, :1])
        batch, _, height, width, _ = first.shape
        video = jnp.zeros((batch, 1 + (latents.shape[1] - 1) * stride, height, width, 3), jnp.uint8)
        video = video.at[:, :1].set(first)
        if latents.shape[1] == 1:
            return video

        def step(carry: tuple[Array, Cache], index: Int[Array, ""]) -> tuple[tuple[Array, Cache], None]:
            video, cache = carry
            latent = jax.lax.dynamic_slice_in_dim(latents, index, 1, axis=1)
            frames, cache = self.decode(trained, latent, cache)
            return (jax.lax.dynamic_update_slice_in_dim(video, frames, 1 + (index - 1) * stride, axis=1), cache), None

        (video, _), _ = jax.lax.scan(step, (video, cache), jnp.arange(1, latents.shape[1]))
        return video

    def stream(
        self, trained: TrainedTokenizer, frames: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Encodes and decodes a video of any length in chunks; memory does not grow with its length.

        Frames whose size the strides don't divide are padded at the right and bottom edge, and cropped again.
        """
        stride_t, *strides_hw = self.tokenizer.config.strides
        encoding = decoding = None
        for chunk in chunks(frames, 1 + CHUNK_LATENTS * stride_t, CHUNK_LATENTS * stride_t):
            height, width = chunk[0].shape[:2]
            padding = [(0, -side % stride) for side, stride in zip((height, width), strides_hw, strict=True)]
            size = (1 if encoding is None else 0) + CHUNK_LATENTS * stride_t
            # The last chunk is padded with its last frame, so that one shape is compiled. The model is causal: padding
            # does not change the frames before it.
            clip = np.stack(chunk + chunk[-1:] * (size - len(chunk)))
            clip = np.pad(clip, ((0, 0), *padding, (0, 0)), mode="edge")[None]
            latents, encoding = self.encode(trained, clip, encoding)
            video, decoding = self.decode(trained, latents, decoding)
            yield from np.asarray(video)[0, : len(chunk), :height, :width]


def chunks(items: Iterable[Any], first: int, later: int) -> Iterator[list[Any]]:
    """Lists of `first` items, then of `later`; the last list may be shorter."""
    chunk, size = [], first
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk, size = [], later
    if chunk:
        yield chunk
