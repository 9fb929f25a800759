"""Stable Diffusion's image autoencoder, the one whose latents DiT and Latte were trained on.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; diffusers calls it `AutoencoderKL`.
It sees one frame at a time. `autoencoder_kl_weights` reads the published weights.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, PRNGKeyArray

from walt_jax.config import Positive
from walt_jax.layers import Linear

# Bounds of the log variance, so that its exponential is finite.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The autoencoder's shape; the defaults are those of Stable Diffusion 1 and 2, DiT and Latte.

    Attributes:
        block_channels: width of each scale, full resolution first. Each scale after the first halves height and width.
        layers_per_block: residual blocks of a scale of the encoder; the decoder has one more.
        latent_channels: c, values that a latent position has.
        norm_groups: groups of each group norm.
        scaling_factor: what latents are multiplied with, so that their standard deviation is about 1.
        dtype: of the computation, "float32" or "bfloat16". Statistics, softmax and latents are float32.
    """

    block_channels: tuple[Positive, ...] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    latent_channels: Positive = 4
    norm_groups: Positive = 32
    scaling_factor: float = 0.18215
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if not self.block_channels:
            raise ValueError("block_channels is empty; it should have a width for each scale")
        for channels in self.block_channels:
            if channels % self.norm_groups:
                raise ValueError(f"norm_groups={self.norm_groups} does not divide {channels} channels")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it should be above 0")

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels a latent position covers in (time, height, width)."""
        stride = 2 ** (len(self.block_channels) - 1)
        return 1, stride, stride

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a clip of `frames` × `height` × `width` pixels.

        Raises:
            ValueError: if the stride does not divide height and width.
        """
        _, stride, _ = self.strides
        if height % stride or width % stride:
            raise ValueError(f"the autoencoder takes multiples of {stride} pixels a side, not {height} × {width}")
        return frames, height // stride, width // stride, self.latent_channels


def _norm(config: AutoencoderKLConfig, name: str) -> nn.GroupNorm:
    # The fast variance, E[x²] - E[x]², loses digits where a group's mean is far from 0.
    return nn.GroupNorm(
        config.norm_groups,
        epsilon=1e-6,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("channels_out",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("channels_out",)),
        name=name,
    )


def _conv(
    config: AutoencoderKLConfig,
    features: int,
    name: str,
    axes: tuple[str, str] = ("channels_in", "channels_out"),
    stride: int = 1,
) -> nn.Conv:
    """A 3² convolution. One that halves is padded behind only, as its weights were trained."""
    pad = (1, 1) if stride == 1 else (0, 1)
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=(pad, pad),
        dtype=jnp.dtype(config.dtype),
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


class ResidualBlock(nn.Module):
    """Twice norm, swish and a 3² convolution, plus the input (linear if the width changes)."""

    features: int
    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w o"]:
        cfg = self.config
        h = _conv(cfg, self.features, "conv1")(nn.swish(_norm(cfg, "norm1")(x)))
        h = _conv(cfg, self.features, "conv2")(nn.swish(_norm(cfg, "norm2")(h)))
        if x.shape[-1] != self.features:
            axes = ("channels_in", "channels_out")
            x = Linear(self.features, axes, dtype=jnp.dtype(cfg.dtype), name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """x + attention of one head over a frame's positions, as wide as the channels."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        _, height, _, channels = x.shape
        dtype, axes = jnp.dtype(self.config.dtype), ("channels_in", "channels_out")
        tokens = rearrange(_norm(self.config, "norm")(x), "n h w c -> n (h w) c")
        q, k, v = (Linear(channels, axes, dtype=dtype, name=name)(tokens) for name in ("query", "key", "value"))
        logits = jnp.einsum("nqc,nkc->nqk", q, k).astype(jnp.float32) * channels**-0.5
        seen = jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(logits).astype(dtype), v)
        seen = Linear(channels, axes, dtype=dtype, name="out")(seen)
        return x + rearrange(seen, "n (h w) c -> n h w c", h=height)


def _middle(config: AutoencoderKLConfig, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """What encoder and decoder do at the coarsest scale; its modules belong to the caller."""
    x = ResidualBlock(config.block_channels[-1], config, name="mid_block0")(x)
    x = Attention(config, name="mid_attention")(x)
    return ResidualBlock(config.block_channels[-1], config, name="mid_block1")(x)


class Encoder(nn.Module):
    """Pixels to the features that the moments are linear in."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n h2 w2 2*c"]:
        cfg, last = self.config, len(self.config.block_channels) - 1
        x = _conv(cfg, cfg.block_channels[0], "conv_in", ("pixel", "channels_out"))(images)
        for scale, width in enumerate(cfg.block_channels):
            for block in range(cfg.layers_per_block):
                x = ResidualBlock(width, cfg, name=f"scale{scale}_block{block}")(x)
            if scale < last:
                x = _conv(cfg, width, f"scale{scale}_down", stride=2)(x)
        x = nn.swish(_norm(cfg, "norm_out")(_middle(cfg, x)))
        return _conv(cfg, 2 * cfg.latent_channels, "conv_out", ("channels_in", "latent"))(x)


class Decoder(nn.Module):
    """The encoder's mirror. A scale is doubled by repeating pixels, then convolved."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "n h2 w2 c"]) -> Float[Array, "n h w 3"]:
        cfg = self.config
        x = _middle(cfg, _conv(cfg, cfg.block_channels[-1], "conv_in", ("latent", "channels_out"))(latents))
        for scale, width in reversed(list(enumerate(cfg.block_channels))):
            for block in range(cfg.layers_per_block + 1):
                x = ResidualBlock(width, cfg, name=f"scale{scale}_block{block}")(x)
            if scale > 0:
                x = repeat(x, "n h w c -> n (h p) (w q) c", p=2, q=2)
                x = _conv(cfg, width, f"scale{scale}_up")(x)
        x = nn.swish(_norm(cfg, "norm_out")(x))
        return _conv(cfg, 3, "conv_out", ("channels_in", "pixel"))(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder, frame by frame; pixels are in -1..1, and a frame's latents depend on that frame only.

    A clip `[b, t, h, w, 3]` or images `[b, h, w, 3]`: all axes before the last three are folded into the batch. Memory
    of the attention grows with the fourth power of a side (4 · 64² · 64² bytes a frame of 512² pixels).
    """

    config: AutoencoderKLConfig

    def setup(self):
        channels, axes = self.config.latent_channels, ("latent", "latent")
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = Linear(2 * channels, axes)
        self.post_quant_conv = Linear(channels, axes)

    def moments(self, video: Float[Array, "*b h w 3"]) -> tuple[Float[Array, "*b h2 w2 c"], Float[Array, "*b h2 w2 c"]]:
        """Mean and log variance of the latents' normal distribution, before `scaling_factor`.

        Raises:
            ValueError: if the stride does not divide height and width.
        """
        self.config.latent_shape(1, *video.shape[-3:-1])
        features = self.encoder(video.reshape(-1, *video.shape[-3:])).astype(jnp.float32)
        mean, logvar = jnp.split(self.quant_conv(features), 2, axis=-1)
        mean, logvar = (m.reshape(*video.shape[:-3], *m.shape[1:]) for m in (mean, logvar))
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def encode(self, video: Float[Array, "*b h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "*b h2 w2 c"]:
        """Latents, scaled: what a denoiser takes. With a key a sample, which DiT trains on; without, the mean.

        Raises:
            ValueError: if the stride does not divide height and width.
        """
        latents, logvar = self.moments(video)
        if key is not None:
            latents = latents + jnp.exp(0.5 * logvar) * jax.random.normal(key, latents.shape)
        return latents * self.config.scaling_factor

    def decode(self, latents: Float[Array, "*b h2 w2 c"]) -> Float[Array, "*b h w 3"]:
        """Pixels, about -1..1 and not clipped, of scaled latents."""
        z = latents.reshape(-1, *latents.shape[-3:]).astype(jnp.float32) / self.config.scaling_factor
        pixels = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
        return pixels.reshape(*latents.shape[:-3], *pixels.shape[1:])

    def __call__(self, video: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
        """The reconstruction from the mean.

        Raises:
            ValueError: if the stride does not divide height and width.
        """
        return self.decode(self.encode(video))
