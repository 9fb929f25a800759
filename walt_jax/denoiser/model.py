"""The denoiser of W.A.L.T: blocks with a window each, AdaLN-LoRA, cross-attention to text, self-conditioning."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from walt_jax.config import Positive
from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.windows import Window
from walt_jax.layers import Linear

CROSS_WINDOW = Window(1, None, None)  # W.A.L.T's cross-attention is spatial, so that images and video share it


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The denoiser's shape.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: number of blocks.
        windows: (time, height, width) of a block each, None for the whole axis; repeated until there are `layers`.
        mlp_ratio: width of the MLP over `dim`.
        patch_size: (time, height, width) of latent positions in a token (1, 1, 1 in the paper).
        adaln_rank: r of AdaLN-LoRA.
        self_conditioning: whether the input has the last estimate of the clean latents beside the noisy ones.
        scan: whether one cycle of `windows` is compiled and scanned over, or all layers are compiled one after the
            other. Compiling deep models takes a fraction of the time when scanned; on CPU the backward pass of a scan
            takes twice the time.
        dtype: of the computation, "float32" or "bfloat16".
    """

    dim: Positive
    heads: Positive
    layers: Positive
    windows: tuple[tuple[Positive | None, Positive | None, Positive | None], ...]
    mlp_ratio: Positive = 4
    patch_size: tuple[Positive, Positive, Positive] = (1, 1, 1)
    adaln_rank: Positive = 2
    self_conditioning: bool = True
    scan: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if not self.windows or self.layers % len(self.windows):
            raise ValueError(f"layers={self.layers} is not a multiple of the {len(self.windows)} windows")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")


def timestep_embedding(time: Float[Array, " b"], dim: int) -> Float[Array, "b d"]:
    """Sinusoids of 1000·t, t in 0..1, as in DiT."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2) / (dim // 2))
    angles = 1000 * time[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: Float[Array, "b t h w d"], dtype: jnp.dtype) -> Float[Array, "b t h w d"]:
    """LayerNorm without parameters: scale and shift come from the condition."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) / jnp.sqrt(variance + 1e-6)).astype(dtype)


def modulate(x: Float[Array, "b t h w d"], scale: Array, shift: Array) -> Float[Array, "b t h w d"]:
    return x * (1 + scale) + shift


def stored(x: Float[Array, "b t h w d"]) -> Float[Array, "b t h w d"]:
    """x, kept in memory: without this XLA's CPU backend recomputes the sum of all earlier residuals at each use.

    The gradient of a model of six layers takes a fifth less time; see `training.state.COMPILER_OPTIONS`.
    """
    return jax.lax.optimization_barrier(x)


class Block(nn.Module):
    """Self-attention in a window, cross-attention to text in the frame, MLP."""

    config: DenoiserConfig
    window: Window

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        condition: Float[Array, "b d"],
        modulation: Float[Array, "b 6*d"],
        text: Float[Array, "b n d"],
        text_mask: Bool[Array, "b n"],
    ) -> Float[Array, "b t h w d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        # AdaLN-LoRA: A_i = A_1 + W_b W_a (c + t)
        low = Linear(cfg.adaln_rank, ("embed", "rank"), use_bias=False, dtype=dtype, name="adaln_a")(condition)
        zeros = nn.initializers.zeros
        modulation = modulation + Linear(
            6 * cfg.dim, ("rank", "embed"), use_bias=False, kernel_init=zeros, dtype=dtype, name="adaln_b"
        )(low)
        modulation = jnp.split(modulation[:, None, None, None, :], 6, axis=-1)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation

        h = modulate(layer_norm(x, dtype), scale_1, shift_1)
        x = stored(x + gate_1 * WindowAttention(cfg.heads, self.window, dtype, name="self_attention")(h))

        h = layer_norm(x, dtype)
        x = stored(x + WindowAttention(cfg.heads, CROSS_WINDOW, dtype, name="cross_attention")(h, text, text_mask))

        h = modulate(layer_norm(x, dtype), scale_2, shift_2)
        h = Linear(cfg.mlp_ratio * cfg.dim, ("embed", "mlp"), dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        return stored(x + gate_2 * Linear(cfg.dim, ("mlp", "embed"), dtype=dtype, name="mlp_out")(h))


class Cycle(nn.Module):
    """One block for each of the config's windows: the body of the scan."""

    config: DenoiserConfig

    @nn.compact
    def __call__(self, x, *context):
        for index, window in enumerate(self.config.windows):
            x = Block(self.config, Window(*window), name=f"block{index}")(x, *context)
        return x, None


class Denoiser(nn.Module):
    """Predicts the target (v, see `diffusion.parameterization`) from noisy latents."""

    config: DenoiserConfig

    @nn.compact
    def __call__(
        self,
        noisy: Float[Array, "b t h w c"],
        time: Float[Array, " b"],
        text: Float[Array, "b n e"],
        text_mask: Bool[Array, "b n"],
        estimate: Float[Array, "b t h w c"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """`time` is in 0 (clean) to 1 (noise); `estimate`, of the clean latents, is zeros where there is none."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        channels = noisy.shape[-1]
        inputs = noisy
        if cfg.self_conditioning:
            inputs = jnp.concatenate([noisy, jnp.zeros_like(noisy) if estimate is None else estimate], axis=-1)
        pt, ph, pw = cfg.patch_size
        tokens = rearrange(inputs, "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        x = Linear(cfg.dim, ("latent", "embed"), dtype=dtype, name="patch_in")(tokens)
        _, t, h, w, _ = x.shape

        small = nn.initializers.normal(0.02)
        axes = ("position", "position", "position", "embed")
        space = self.param("space_embedding", nn.with_logical_partitioning(small, axes), (1, h, w, cfg.dim))
        frame = self.param("time_embedding", nn.with_logical_partitioning(small, axes), (t, 1, 1, cfg.dim))
        x = x + (space + frame)[None].astype(dtype)

        text = Linear(cfg.dim, ("text", "embed"), dtype=dtype, name="text_in")(text)
        # c + t of the paper: what the whole clip shares, its time and its caption's mean.
        weights = text_mask[..., None] / jnp.maximum(text_mask.sum(1), 1)[:, None, None]
        pooled = Linear(cfg.dim, dtype=dtype, name="text_pooled")((text * weights).sum(1))
        embedded = Linear(cfg.dim, dtype=dtype, name="time_in")(timestep_embedding(time, 256))
        condition = nn.swish(Linear(cfg.dim, dtype=dtype, name="time_out")(nn.swish(embedded)) + pooled)

        zeros = nn.initializers.zeros
        modulation = Linear(6 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln")(condition)
        cycles = cfg.layers // len(cfg.windows)
        context = (condition, modulation, text, text_mask)
        if cfg.scan:
            scanned = nn.scan(
                Cycle,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=cycles,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(cfg, name="cycles")(x, *context)
        else:
            for cycle in range(cycles):
                x, _ = Cycle(cfg, name=f"cycle{cycle}")(x, *context)

        last = Linear(2 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln_out")(condition)
        scale, shift = jnp.split(last[:, None, None, None, :], 2, axis=-1)
        x = modulate(layer_norm(x, dtype), scale, shift)
        x = Linear(channels * pt * ph * pw, ("embed", "latent"), kernel_init=zeros, dtype=dtype, name="patch_out")(x)
        x = rearrange(x, "b t h w (pt ph pw c) -> b (t pt) (h ph) (w pw) c", pt=pt, ph=ph, pw=pw)
        return x.astype(jnp.float32)
