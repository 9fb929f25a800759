"""MAGVIT-v2's encoder and decoder, of whole clips or of chunks, with a head between them."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from walt_jax.config import Positive
from walt_jax.layers import Linear
from walt_jax.tokenizer.block_transform import Analysis, Synthesis
from walt_jax.tokenizer.convolution import CONVOLVED, Cache, CausalConv, Downsample, Route, Upsample, part
from walt_jax.tokenizer.quantizers import Head, HeadConfig, Quantized


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's shape.

    Attributes:
        latent_channels: c of W.A.L.T, values a latent position has; 18 with the head "lfq" are 2^18 codes.
        base_channels: width at full resolution (128 in the paper).
        channel_multipliers: one per scale, full resolution first.
        downsample: for each transition between scales, the (time, height, width) strides. MAGVIT-v2 halves height and
            width in each, and time late: (1, 2, 2), (2, 2, 2), (2, 2, 2).
        residual_blocks: at each scale (4 in the paper).
        norm_groups: groups of each group norm (32 in the paper).
        patch_size: side of the square of pixels that is moved into channels before the first convolution (1 in the
            paper). 2 leaves out the scale at full resolution, which costs more than all others together.
        dtype: of the computation, "float32" or "bfloat16".
        remat: what the forward pass saves of residual blocks for the backward pass, which recomputes the rest: "none"
            saves all that gradients need; "convolutions" their convolutions' outputs; "block" only their inputs.
        taps: kernel size of convolutions in time, 3 in the paper; 1 for a tokenizer of images.
        head: what is between encoder and decoder.
        route: implementation of the convolutions, see `convolution.convolve`.
        block_transform: whether a linear path is added to encoder and decoder, see `block_transform`; not in the
            paper.
        block_bits: with `block_transform` and the head "lfq": how many latent channels, a bit each, encode each
            principal component, the first component first; () gives a bit to each.
    """

    latent_channels: Positive
    base_channels: Positive
    channel_multipliers: tuple[Positive, ...]
    downsample: tuple[tuple[Positive, Positive, Positive], ...]
    residual_blocks: Positive
    norm_groups: Positive
    patch_size: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "convolutions", "block"] = "none"
    taps: Positive = 3
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    route: Route = "auto"
    block_transform: bool = False
    block_bits: tuple[Positive, ...] = ()

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
        if max((time for time, _, _ in self.downsample), default=1) > self.taps:
            raise ValueError(f"taps={self.taps} is less than a stride in time: frames would be passed over")
        if self.block_bits and not (self.block_transform and self.head.name == "lfq"):
            raise ValueError("block_bits is for block_transform=True with the head 'lfq'")
        if self.block_bits and sum(self.block_bits) != self.latent_channels:
            raise ValueError(
                f"block_bits adds up to {sum(self.block_bits)} and latent_channels is {self.latent_channels}"
            )
        self.head.check(self.latent_channels)

    def of_images(self) -> "TokenizerConfig":
        """The tokenizer of single frames that can be inflated to this one, see `inflation`."""
        return dataclasses.replace(self, taps=1, downsample=tuple((1, h, w) for _, h, w in self.downsample))

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels a latent position covers in (time, height, width)."""
        time, height, width = (math.prod(strides[axis] for strides in self.downsample) for axis in range(3))
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
    """Group normalisation with statistics per frame: statistics over time would make frame 0 depend on later frames.

    With `condition` (the latents) it is the decoder's adaptive group norm: a frame's scale and shift are linear in the
    mean of the latent frame that it is decoded from. Without, they are learned constants.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        condition: Float[Array, "b t2 h2 w2 z"] | None = None,
        first: bool = True,
    ) -> Float[Array, "b t h w c"]:
        """`first` says whether the chunk begins the clip, so that its frame 0 has its own latent frame."""
        *_, channels = x.shape
        # In float32 to the end: gradients of scale and shift are sums over all positions.
        x = x.astype(jnp.float32)
        x = x - self._of_groups(x)
        x = x / jnp.sqrt(self._of_groups(jnp.square(x)) + 1e-6)
        if condition is None:
            axis = ("channels_out",)
            scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, axis), (channels,))
            shift = self.param("shift", nn.with_logical_partitioning(nn.initializers.zeros, axis), (channels,))
            scale, shift = scale[None, None, None, None], shift[None, None, None, None]
        else:
            pooled = frames_of_latents(condition.mean(axis=(2, 3)), x.shape[1], first)
            affine = Linear(2 * channels, ("latent", "channels_out"), kernel_init=nn.initializers.zeros, name="affine")
            scale, shift = jnp.split(affine(pooled)[:, :, None, None, :], 2, axis=-1)
            scale = 1 + scale
        return (x * scale + shift).astype(self.dtype)

    def _of_groups(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t 1 1 c"]:
        """The mean of each channel's group, from those of channels: an axis of groups would move x on a TPU."""
        means = rearrange(x.mean(axis=(2, 3)), "b t (g c) -> b t g c", g=self.groups).mean(-1)
        return jnp.repeat(means, x.shape[-1] // self.groups, axis=-1)[:, :, None, None]


def frames_of_latents(x: Float[Array, "b t2 c"], frames: int, first: bool) -> Float[Array, "b t c"]:
    """For each of a chunk's frames the latent frame that it is decoded from: frame 0 of a clip has its own."""
    own = 1 if first else 0
    factor = (frames - own) // max(x.shape[1] - own, 1)
    return jnp.concatenate([x[:, :own], jnp.repeat(x[:, own:], factor, axis=1)], axis=1)


class ResidualBlock(nn.Module):
    """norm, swish, 3³ convolution, norm, swish, 3³ convolution, plus the input (linear if the width changes).

    The last convolution starts at zero: an encoder and decoder that start as nearly linear maps leave the plateau at
    the beginning of training in half the steps.
    """

    features: int
    config: TokenizerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], cache: Cache = None) -> tuple[Float[Array, "b t h w o"], Cache]:
        cfg, dtype, after = self.config, jnp.dtype(self.config.dtype), {}
        kernel = {"kernel_size": (cfg.taps, 3, 3), "route": cfg.route, "dtype": dtype}
        h = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_in")(x))
        conv_in = CausalConv(self.features, use_bias=False, **kernel, name="conv_in")
        h, after["conv_in"] = conv_in(h, part(cache, "conv_in"))
        h = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_out")(h))
        conv_out = CausalConv(self.features, kernel_init=nn.initializers.zeros, **kernel, name="conv_out")
        h, after["conv_out"] = conv_out(h, part(cache, "conv_out"))
        if x.shape[-1] != self.features:
            axes = ("channels_in", "channels_out")
            x = Linear(self.features, axes, use_bias=False, dtype=dtype, name="shortcut")(x)
        return x + h, after


def residual_block(features: int, config: TokenizerConfig, name: str) -> nn.Module:
    """A `ResidualBlock` with the config's `remat`; it belongs to the module that calls this."""
    policies = {
        "convolutions": jax.checkpoint_policies.save_only_these_names(CONVOLVED),
        "block": jax.checkpoint_policies.nothing_saveable,
    }
    kind = ResidualBlock if config.remat == "none" else nn.remat(ResidualBlock, policy=policies[config.remat])
    return kind(features, config, name=name)


class Encoder(nn.Module):
    """Pixels to what the head takes."""

    config: TokenizerConfig
    features: int

    @nn.compact
    def __call__(
        self, video: Float[Array, "b t h w 3"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 i"], Cache]:
        cfg, dtype, after = self.config, jnp.dtype(self.config.dtype), {}

        def run(module: nn.Module, x: Array) -> Array:
            x, after[module.name] = module(x, part(cache, module.name))
            return x

        widths = [cfg.base_channels * m for m in cfg.channel_multipliers]
        kernel = {"kernel_size": (cfg.taps, 3, 3), "route": cfg.route, "dtype": dtype}
        x = rearrange(video, "b t (h p) (w q) c -> b t h w (p q c)", p=cfg.patch_size, q=cfg.patch_size)
        x = run(CausalConv(widths[0], axes=("pixel", "channels_out"), **kernel, name="conv_in"), x)
        for scale, width in enumerate(widths):
            for block in range(cfg.residual_blocks):
                x = run(residual_block(width, cfg, f"scale{scale}_block{block}"), x)
            if scale < len(widths) - 1:
                strides = cfg.downsample[scale]
                x = run(Downsample(width, strides, cfg.taps, cfg.route, dtype, name=f"scale{scale}_down"), x)
        for block in range(cfg.residual_blocks):
            x = run(residual_block(widths[-1], cfg, f"last_block{block}"), x)
        x = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_out")(x))
        init = nn.initializers.zeros if cfg.block_transform else nn.initializers.lecun_normal()
        x = Linear(self.features, ("channels_in", "latent"), kernel_init=init, dtype=dtype, name="conv_out")(x)
        x = x.astype(jnp.float32)
        if cfg.block_transform:
            blocks = Analysis(cfg.latent_channels, cfg.strides, cfg.block_bits, name="blocks")(video, cache is None)
            x = x + jnp.pad(blocks, ((0, 0),) * 4 + ((0, self.features - cfg.latent_channels),))
        return x, after


class Decoder(nn.Module):
    """Latents to pixels: the encoder's mirror, with an adaptive group norm before each scale's blocks."""

    config: TokenizerConfig

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b t2 h2 w2 c"], cache: Cache = None
    ) -> tuple[Float[Array, "b t h w 3"], Cache]:
        cfg, dtype, after = self.config, jnp.dtype(self.config.dtype), {}

        def run(module: nn.Module, x: Array) -> Array:
            x, after[module.name] = module(x, part(cache, module.name))
            return x

        widths = [cfg.base_channels * m for m in cfg.channel_multipliers]
        kernel = {"kernel_size": (cfg.taps, 3, 3), "route": cfg.route, "dtype": dtype}
        x = run(CausalConv(widths[-1], axes=("latent", "channels_out"), **kernel, name="conv_in"), latents)
        for block in range(cfg.residual_blocks):
            x = run(residual_block(widths[-1], cfg, f"first_block{block}"), x)
        for scale, width in reversed(list(enumerate(widths))):
            x = FrameNorm(cfg.norm_groups, dtype, name=f"scale{scale}_norm")(x, latents, cache is None)
            for block in range(cfg.residual_blocks):
                x = run(residual_block(width, cfg, f"scale{scale}_block{block}"), x)
            if scale > 0:
                below, strides = widths[scale - 1], cfg.downsample[scale - 1]
                x = run(Upsample(below, strides, cfg.taps, cfg.route, dtype, name=f"scale{scale}_up"), x)
        x = nn.swish(FrameNorm(cfg.norm_groups, dtype, name="norm_out")(x))
        init = nn.initializers.zeros if cfg.block_transform else nn.initializers.lecun_normal()
        axes = ("channels_in", "pixel")
        pixels = CausalConv(3 * cfg.patch_size**2, axes=axes, kernel_init=init, **kernel, name="conv_out")
        x = run(pixels, x).astype(jnp.float32)
        x = rearrange(x, "b t h w (p q c) -> b t (h p) (w q) c", p=cfg.patch_size, q=cfg.patch_size)
        if cfg.block_transform:
            x = x + Synthesis(cfg.strides, cfg.block_bits, name="blocks")(latents, cache is None)
        return x, after


class Tokenizer(nn.Module):
    """Encoder, head and decoder. Video is in -1..1; latents are not normalised, see `training` for that.

    `encode`, `tokenize` and `decode` take a clip, or its chunks one after the other: each call takes the cache that the
    previous one returned, None for the first. Chunks and the whole clip give equal results.
    """

    config: TokenizerConfig

    def setup(self):
        self.head = Head(self.config.head, self.config.latent_channels)
        self.encoder = Encoder(self.config, self.config.head.inputs(self.config.latent_channels))
        self.decoder = Decoder(self.config)

    def encode(
        self, video: Float[Array, "b t h w 3"], cache: Cache = None
    ) -> tuple[Float[Array, "b t2 h2 w2 c"], Cache]:
        """Latents of a chunk of any length; the first chunk has at least one frame.

        Frames that do not complete a latent frame yet are kept in the cache.
        """
        z, cache = self._features(video, cache)
        return self.head(z).latents, cache

    def tokenize(
        self, video: Float[Array, "b t h w 3"], cache: Cache = None
    ) -> tuple[Int[Array, "b t2 h2 w2 g"], Cache]:
        """Codes instead of latents; `lookup` makes latents of them, equal to `encode`'s.

        Raises:
            ValueError: if the head has none.
        """
        z, cache = self._features(video, cache)
        indices = self.head(z).indices
        if indices is None:
            raise ValueError(f"the head {self.config.head.name!r} has no codes")
        return indices, cache

    def lookup(self, indices: Int[Array, "b t h w g"]) -> Float[Array, "b t h w c"]:
        """The latents of codes."""
        return self.head.lookup(indices)

    def decode(
        self, latents: Float[Array, "b t2 h2 w2 c"], cache: Cache = None
    ) -> tuple[Float[Array, "b t h w 3"], Cache]:
        """The first latent frame of a clip makes one frame, each other as many as the stride in time."""
        return self.decoder(latents, cache)

    def noise(self, shape: tuple[int, ...]) -> Float[Array, "b t h w c"] | None:
        """What the head draws in training for latents of this shape, see `Head.noise`."""
        return self.head.noise(shape)

    def __call__(
        self, video: Float[Array, "b t h w 3"], train: bool = False, noise: Float[Array, "b t h w c"] | None = None
    ) -> tuple[Float[Array, "b t h w 3"], Quantized]:
        """The reconstruction of whole clips, and what the head made; `noise` is what `noise` draws.

        Raises:
            ValueError: if the strides don't divide the clip.
        """
        self.config.latent_shape(*video.shape[1:4])
        z, _ = self.encoder(video)
        quantized = self.head(z, train, noise)
        return self.decoder(quantized.latents)[0], quantized

    def _features(self, video: Float[Array, "b t h w 3"], cache: Cache) -> tuple[Float[Array, "b t2 h2 w2 i"], Cache]:
        """The encoder on the frames that are complete; its cache has those that aren't, under "waiting"."""
        stride = self.config.strides[0]
        waiting = part(cache, "waiting")
        if waiting is not None:
            video = jnp.concatenate([waiting, video], axis=1)
        _, height, width, _ = self.config.latent_shape(1, *video.shape[2:4])
        frames = video.shape[1]
        first = 1 if cache is None else 0
        complete = first + (frames - first) // stride * stride
        waiting = video[:, complete:] if complete < frames else None
        if complete:
            z, after = self.encoder(video[:, :complete], part(cache, "encoder"))
        else:
            z = jnp.zeros((len(video), 0, height, width, self.encoder.features))
            after = cache["encoder"]
        return z, {"encoder": after, "waiting": waiting}
