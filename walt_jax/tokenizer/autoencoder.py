"""MAGVIT-v2's encoder and decoder with continuous latents, as W.A.L.T uses them."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from walt_jax.config import Positive
from walt_jax.layers import Linear
from walt_jax.tokenizer.convolution import CausalConv, Downsample, Upsample


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's shape.

    Attributes:
        latent_channels: c of W.A.L.T, values a latent position has.
        base_channels: width at full resolution (128 in the paper).
        channel_multipliers: a scale each, full resolution first.
        downsample: for each transition between scales, the (time, height, width) strides. MAGVIT-v2 halves height and
            width in each, and time late: (1, 2, 2), (2, 2, 2), (2, 2, 2).
        residual_blocks: at each scale (4 in the paper).
        norm_groups: groups of each group norm (32 in the paper).
        patch_size: side of the square of pixels that is folded into channels before the first convolution (1 in the
            paper). 2 leaves out the scale at full resolution, which costs more than all others together.
        dtype: of the computation, "float32" or "bfloat16".
    """

    latent_channels: Positive
    base_channels: Positive
    channel_multipliers: tuple[Positive, ...]
    downsample: tuple[tuple[Positive, Positive, Positive], ...]
    residual_blocks: Positive
    norm_groups: Positive
    patch_size: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if len(self.downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"downsample has {len(self.downsample)} entries; "
                f"{len(self.channel_multipliers)} channel_multipliers need one less than there are of them"
            )
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups} does not divide {self.base_channels * multiplier} channels"
                )

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels a latent position covers in (time, height, width)."""
        time, height, width = (math.prod(strides) for strides in zip(*self.downsample, strict=True))
        return time, height * self.patch_size, width * self.patch_size

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a clip of `frames` × `height` × `width` pixels.

        Raises:
            ValueError: if the strides do not divide frames - 1, height and width.
        """
        stride_t, stride_h, stride_w = self.strides
        if (frames - 1) % stride_t or height % stride_h or width % stride_w:
            raise ValueError(
                f"the tokenizer takes 1 + {stride_t}n frames, a multiple of {stride_h} for height and of {stride_w} "
                f"for width, not {frames} × {height} × {width}"
            )
        return 1 + (frames - 1) // stride_t, height // stride_h, width // stride_w, self.latent_channels


class FrameNorm(nn.Module):
    """Group normalisation with statistics per frame: over time they would tie frame 0 to frames that come later.

    With `condition` (the latents) it is the decoder's adaptive group norm: scale and shift of a frame are linear in the
    mean of the latent frame that it is decoded from; without, they are learned constants.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], condition: Float[Array, "b t2 h2 w2 z"] | None = None
    ) -> Float[Array, "b t h w c"]:
        _, frames, *_, channels = x.shape
        grouped = rearrange(x, "b t h w (g c) -> b t (h w) g c", g=self.groups).astype(jnp.float32)
        mean = grouped.mean(axis=(2, 4), keepdims=True)
        variance = jnp.square(grouped - mean).mean(axis=(2, 4), keepdims=True)
        x = ((grouped - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape).astype(self.dtype)
        if condition is None:
            axis = ("channels_out",)
            scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, axis), (channels,))
            shift = self.param("shift", nn.with_logical_partitioning(nn.initializers.zeros, axis), (channels,))
            scale, shift = scale[None, None, None, None], shift[None, None, None, None]
        else:
            pooled = condition.mean(axis=(2, 3))
            # Frame 0 stands alone, then each latent frame makes `factor` frames.
            factor = (frames - 1) // max(condition.shape[1] - 1, 1)
            pooled = jnp.concatenate([pooled[:, :1], jnp.repeat(pooled[:, 1:], factor, axis=1)], axis=1)
            affine = Linear(2 * channels, ("latent", "channels_out"), kernel_init=nn.initializers.zeros, name="affine")
            scale, shift = jnp.split(affine(pooled)[:, :, None, None, :], 2, axis=-1)
            scale = 1 + scale
        return x * scale.astype(self.dtype) + shift.astype(self.dtype)


class ResidualBlock(nn.Module):
    """norm, swish, 3³ convolution, norm, swish, 3³ convolution, plus the input (1³ convolution if the width changes).

    The last convolution starts at zero: an encoder and decoder that start as nearly linear maps leave the plateau at
    the beginning of training in half the steps.
    """

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        h = nn.swish(FrameNorm(self.groups, self.dtype, name="norm_in")(x))
        h = CausalConv(self.features, use_bias=False, dtype=self.dtype, name="conv_in")(h)
        h = nn.swish(FrameNorm(self.groups, self.dtype, name="norm_out")(h))
        zeros = nn.initializers.zeros
        h = CausalConv(self.features, kernel_init=zeros, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = CausalConv(self.features, (1, 1, 1), use_bias=False, dtype=self.dtype, name="shortcut")(x)
        return x + h


class Encoder(nn.Module):
    """Pixels to latents."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 c"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        widths = [cfg.base_channels * m for m in cfg.channel_multipliers]
        x = rearrange(video, "b t (h p) (w q) c -> b t h w (p q c)", p=cfg.patch_size, q=cfg.patch_size)
        x = CausalConv(widths[0], dtype=dtype, name="conv_in")(x)
        for scale, width in enumerate(widths):
            for block in range(cfg.residual_blocks):
                x = ResidualBlock(width, cfg.norm_groups, dtype, name=f"scale{scale}_block{block}")(x)
            if scale < len(widths) - 1:
                x = Downsample(width, cfg.downsample[scale], dtype, name=f"scale{scale}_down")(x)
        for block in range(cfg.residual_blocks):
            x = ResidualBlock(widths[-1], cfg.norm_groups, dtype, name=f"last_block{block}")(x)
        x = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_out")(x))
        return CausalConv(cfg.latent_channels, (1, 1, 1), dtype=dtype, name="conv_out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents to pixels: the encoder's mirror, with an adaptive group norm before each scale's blocks."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "b t2 h2 w2 c"]) -> Float[Array, "b t h w 3"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        widths = [cfg.base_channels * m for m in cfg.channel_multipliers]
        x = CausalConv(widths[-1], dtype=dtype, name="conv_in")(latents)
        for block in range(cfg.residual_blocks):
            x = ResidualBlock(widths[-1], cfg.norm_groups, dtype, name=f"first_block{block}")(x)
        for scale, width in reversed(list(enumerate(widths))):
            x = FrameNorm(cfg.norm_groups, dtype, name=f"scale{scale}_norm")(x, latents)
            for block in range(cfg.residual_blocks):
                x = ResidualBlock(width, cfg.norm_groups, dtype, name=f"scale{scale}_block{block}")(x)
            if scale > 0:
                x = Upsample(widths[scale - 1], cfg.downsample[scale - 1], dtype, name=f"scale{scale}_up")(x)
        x = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_out")(x))
        x = CausalConv(3 * cfg.patch_size**2, dtype=dtype, name="conv_out")(x).astype(jnp.float32)
        return rearrange(x, "b t h w (p q c) -> b t (h p) (w q) c", p=cfg.patch_size, q=cfg.patch_size)


class Tokenizer(nn.Module):
    """The two together. Video is in -1..1; latents are as they come, see `training` for their normalisation."""

    config: TokenizerConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 c"]:
        return self.encoder(video)

    def decode(self, latents: Float[Array, "b t2 h2 w2 c"]) -> Float[Array, "b t h w 3"]:
        return self.decoder(latents)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array]:
        """Returns the reconstruction and the latents."""
        latents = self.encode(video)
        return self.decode(latents), latents
