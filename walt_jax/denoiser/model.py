"""The denoiser of W.A.L.T: blocks with a window each, AdaLN-LoRA, cross-attention to text, self-conditioning."""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from walt_jax.config import Positive, Range
from walt_jax.denoiser.attention import Relative, WindowAttention
from walt_jax.denoiser.layout import Grid, Layout, to_tokens
from walt_jax.denoiser.windows import Window
from walt_jax.layers import Linear

CROSS_WINDOW = Window(1, None, None)  # W.A.L.T's cross-attention is spatial, so that images and video share it
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The denoiser's shape.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: number of blocks.
        windows: (time, height, width) of a block each, None for the whole axis; repeated until there are `layers`.
        mlp_ratio: width of the MLP over `dim`, rounded to a whole width.
        patch_size: (time, height, width) of latent positions in a token (1, 1, 1 in the paper).
        adaln: how a block gets its modulation: "lora" (W.A.L.T), or "separate", a layer of its own (DiT).
        adaln_rank: r of AdaLN-LoRA; 2 in the paper.
        positions: "learned" embeddings of space and time, summed (W.A.L.T); "fractional", NaViT's factorised ones of
            t, y and x over the clip's size; or "none".
        relative: in windows: "bias" for each offset (W.A.L.T), "rotary" in three dimensions, or "none".
        qk_norm: whether queries and keys are normalised.
        cross_attention: whether blocks attend to text.
        classes: labels there are; 0 for a model without.
        self_conditioning: whether the input has the last estimate of the clean latents beside the noisy ones.
        frame_prediction: whether the input has clean latents where they are given, and the mask that tells where.
        upscale: above 1, the input has low-resolution latents, upscaled so many times.
        images_alone: whether tokens of images see themselves alone where windows span time (W.A.L.T's identity mask).
        scan: whether one cycle of `windows` is compiled and scanned over, or all layers are compiled one after the
            other. Compiling deep models takes a fraction of the time when scanned; on CPU the backward pass of a scan
            takes twice the time.
        remat: what the backward pass computes again: "none", "dots" all but matrix products with weights, "block" a
            whole cycle of blocks.
        dtype: of the computation, "float32" or "bfloat16".
    """

    dim: Positive
    heads: Positive
    layers: Positive
    windows: tuple[tuple[Positive | None, Positive | None, Positive | None], ...]
    mlp_ratio: Annotated[float, Range(0.01)] = 4.0
    patch_size: tuple[Positive, Positive, Positive] = (1, 1, 1)
    adaln: Literal["lora", "separate"] = "lora"
    adaln_rank: Positive = 2
    positions: Literal["learned", "fractional", "none"] = "learned"
    relative: Relative = "bias"
    qk_norm: bool = True
    cross_attention: bool = True
    classes: int = 0
    self_conditioning: bool = True
    frame_prediction: bool = False
    upscale: Positive = 1
    images_alone: bool = False
    scan: bool = False
    remat: Literal["none", "dots", "block"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if not self.windows or self.layers % len(self.windows):
            raise ValueError(f"layers={self.layers} is not a multiple of the {len(self.windows)} windows")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        features = self.dim // self.heads
        if self.relative == "rotary" and (features % 2 or features < 6):
            raise ValueError(f"relative='rotary' turns pairs of features, at least 3; heads have {features} features")
        if self.adaln == "separate" and self.adaln_rank != DenoiserConfig.adaln_rank:
            raise ValueError("adaln_rank is for adaln='lora'")

    @property
    def attention_windows(self) -> tuple[Window, ...]:
        """The windows that attention is computed in, each once."""
        cross = (CROSS_WINDOW,) if self.cross_attention else ()
        return tuple(dict.fromkeys((*(Window(*window) for window in self.windows), *cross)))

    def grid(self, latents: tuple[int, int, int]) -> Grid:
        """Tokens along (t, h, w) of a clip of so many latent positions.

        Raises:
            ValueError: if `patch_size` does not divide them.
        """
        if any(length % size for length, size in zip(latents, self.patch_size, strict=True)):
            raise ValueError(f"patch_size {self.patch_size} does not divide latents of {latents}")
        t, h, w = (length // size for length, size in zip(latents, self.patch_size, strict=True))
        return t, h, w


@flax.struct.dataclass
class Condition:
    """What a batch's clips are conditioned on; None is what the model has no input for.

    Attributes:
        text: embeddings of m tokens a clip.
        text_mask: which of them are there.
        label: of each clip, 0 … classes - 1; `classes` where it is dropped.
        known: clean latents where they are given, zeros elsewhere.
        known_mask: 1 where they are given, a value a latent position.
        low: clean low-resolution latents, with noise; of equal clips alone.
        low_time: how much noise, as a time.
    """

    text: Float[Array, "b s m e"] | None = None
    text_mask: Bool[Array, "b s m"] | None = None
    label: Int[Array, "b s"] | None = None
    known: Float[Array, "b n p"] | None = None
    known_mask: Float[Array, "b n q"] | None = None
    low: Float[Array, "b t h w c"] | None = None
    low_time: Float[Array, "b s"] | None = None


def timestep_embedding(time: Float[Array, "*n"], dim: int) -> Float[Array, "*n d"]:
    """Sinusoids of 1000·t, t in 0..1, as in DiT."""
    return sinusoids(1000 * time, dim)


def sinusoids(values: Float[Array, "*n"], dim: int) -> Float[Array, "*n d"]:
    """Cosines and sines of the values at `dim / 2` frequencies from 1 down to 1/10,000."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2) / (dim // 2))
    angles = values[..., None] * jnp.expand_dims(frequencies, tuple(range(values.ndim)))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: Float[Array, "b n d"], dtype: jnp.dtype) -> Float[Array, "b n d"]:
    """LayerNorm without parameters: scale and shift come from the condition."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) / jnp.sqrt(variance + 1e-6)).astype(dtype)


def modulate(x: Float[Array, "b n d"], scale: Array, shift: Array) -> Float[Array, "b n d"]:
    return x * (1 + scale) + shift


def stored(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """x, kept in memory: without this XLA's CPU backend recomputes the sum of all earlier residuals at each use.

    The gradient of a model of six layers takes a fifth less time; see `training.state.COMPILER_OPTIONS`.
    """
    return jax.lax.optimization_barrier(x)


class Block(nn.Module):
    """Self-attention in a window, cross-attention to text in the frame, MLP."""

    config: DenoiserConfig
    window: Window
    bounds: Grid

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        condition: Float[Array, "b s d"],
        modulation: Float[Array, "b s 6*d"] | None,
        text: Float[Array, "b s m d"] | None,
        text_mask: Bool[Array, "b s m"] | None,
        layout: Layout,
    ) -> Float[Array, "b n d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        zeros = nn.initializers.zeros
        if cfg.adaln == "separate":
            adaln = Linear(6 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln")
            modulation = adaln(condition)
        else:
            # A_i = A_1 + W_b W_a (c + t)
            low = Linear(cfg.adaln_rank, ("embed", "rank"), use_bias=False, dtype=dtype, name="adaln_a")(condition)
            modulation = modulation + Linear(
                6 * cfg.dim, ("rank", "embed"), use_bias=False, kernel_init=zeros, dtype=dtype, name="adaln_b"
            )(low)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = jnp.split(layout.spread(modulation), 6, axis=-1)

        def attention(window, name):
            bounds = window.bounds(self.bounds)
            return WindowAttention(cfg.heads, window, bounds, cfg.relative, cfg.qk_norm, dtype, name=name)

        alone = cfg.images_alone and self.window.time != 1
        h = modulate(layer_norm(x, dtype), scale_1, shift_1)
        x = stored(x + gate_1 * attention(self.window, "self_attention")(h, layout, images_alone=alone))

        if cfg.cross_attention:
            h = layer_norm(x, dtype)
            x = stored(x + attention(CROSS_WINDOW, "cross_attention")(h, layout, text, text_mask))

        h = modulate(layer_norm(x, dtype), scale_2, shift_2)
        h = Linear(round(cfg.mlp_ratio * cfg.dim), ("embed", "mlp"), dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        return stored(x + gate_2 * Linear(cfg.dim, ("mlp", "embed"), dtype=dtype, name="mlp_out")(h))


class Cycle(nn.Module):
    """One block for each of the config's windows: the body of the scan."""

    config: DenoiserConfig
    bounds: Grid

    @nn.compact
    def __call__(self, x, *context):
        for index, window in enumerate(self.config.windows):
            x = Block(self.config, Window(*window), self.bounds, name=f"block{index}")(x, *context)
        return x, None


class Denoiser(nn.Module):
    """Predicts the target (see `diffusion.parameterization`) from noisy latents, as tokens.

    Attributes:
        config: see `DenoiserConfig`.
        bounds: tokens along (t, h, w) of the largest clip.
    """

    config: DenoiserConfig
    bounds: Grid

    @nn.compact
    def __call__(
        self,
        noisy: Float[Array, "b n p"],
        time: Float[Array, "b s"],
        condition: Condition,
        layout: Layout,
        estimate: Float[Array, "b n p"] | None = None,
    ) -> Float[Array, "b n p"]:
        """`time` is in 0 (clean) to 1 (noise); `estimate`, of the clean latents, is zeros where there is none."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        patch = noisy.shape[-1]
        inputs = jnp.concatenate(self._inputs(noisy, condition, estimate), axis=-1)
        # Whatever a pack is filled up with: no gradient may become NaN by it.
        inputs = jnp.where(layout.valid()[..., None], inputs, 0)
        x = Linear(cfg.dim, ("latent", "embed"), dtype=dtype, name="patch_in")(inputs)
        x = x + self._positions(layout).astype(dtype)

        text, text_mask = condition.text, condition.text_mask
        # c + t of the paper: what the whole clip shares, its time and its caption's mean or its label.
        shared = self._embedded_time(time, "time")
        if cfg.cross_attention:
            text = Linear(cfg.dim, ("text", "embed"), dtype=dtype, name="text_in")(text)
            weights = text_mask[..., None] / jnp.maximum(text_mask.sum(-1), 1)[..., None, None]
            shared = shared + Linear(cfg.dim, dtype=dtype, name="text_pooled")((text * weights).sum(-2))
        if cfg.classes:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
            labels = self.param("label_embedding", init, (cfg.classes + 1, cfg.dim))
            shared = shared + labels[condition.label].astype(dtype)
        if cfg.upscale > 1:
            shared = shared + self._embedded_time(condition.low_time, "low_time")
        shared = nn.swish(shared)

        zeros, modulation = nn.initializers.zeros, None
        if cfg.adaln == "lora":
            adaln = Linear(6 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln")
            modulation = adaln(shared)
        context = (shared, modulation, text, text_mask, layout)
        x = self._blocks(x, context)

        last = Linear(2 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln_out")(shared)
        scale, shift = jnp.split(layout.spread(last), 2, axis=-1)
        x = modulate(layer_norm(x, dtype), scale, shift)
        x = Linear(patch, ("embed", "latent"), kernel_init=zeros, dtype=dtype, name="patch_out")(x)
        return x.astype(jnp.float32)

    def _inputs(self, noisy: Array, condition: Condition, estimate: Array | None) -> list[Array]:
        """What a token is made of, beside each other."""
        cfg, inputs = self.config, [noisy]
        if cfg.self_conditioning:
            inputs.append(jnp.zeros_like(noisy) if estimate is None else estimate)
        if cfg.frame_prediction:
            inputs += [condition.known, condition.known_mask]
        if cfg.upscale > 1:
            scale, channels = cfg.upscale, condition.low.shape[-1]
            kernel_init = nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, None, None, "latent", "channels_out")
            )
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("channels_out",))
            up = nn.Conv(scale**2 * channels, (1, 3, 3), kernel_init=kernel_init, bias_init=bias_init, name="upscale")(
                condition.low
            )
            up = rearrange(up, "b t h w (p q c) -> b t (h p) (w q) c", p=scale, q=scale)
            inputs.append(to_tokens(up, cfg.patch_size))
        return inputs

    def _positions(self, layout: Layout) -> Float[Array, "b n d"]:
        """The embedding of each token's place, `[1, n, d]` for equal clips."""
        cfg, (t, h, w) = self.config, self.bounds
        place = layout.coordinates()
        if cfg.positions == "none":
            return jnp.zeros((1, 1, cfg.dim))
        if cfg.positions == "fractional":
            sizes = layout.spread(layout.clip_sizes().astype(jnp.float32))
            fractions = (place + 0.5) / jnp.maximum(sizes, 1)
            # 64 rather than 1000: neighbours in a clip of many tokens differ, and few of the waves are constant
            return sum(
                Linear(cfg.dim, ("position", "embed"), use_bias=axis == 0, name=f"position_{name}")(
                    sinusoids(64 * fractions[..., axis], 64)
                )
                for axis, name in enumerate("tyx")
            )
        small = nn.with_logical_partitioning(
            nn.initializers.normal(0.02), ("position", "position", "position", "embed")
        )
        space = self.param("space_embedding", small, (1, h, w, cfg.dim))
        frame = self.param("time_embedding", small, (t, 1, 1, cfg.dim))
        return space[0, place[..., 1], place[..., 2]] + frame[place[..., 0], 0, 0]

    def _embedded_time(self, time: Float[Array, "b s"], name: str) -> Float[Array, "b s d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        embedded = Linear(cfg.dim, dtype=dtype, name=f"{name}_in")(timestep_embedding(time, 256))
        return Linear(cfg.dim, dtype=dtype, name=f"{name}_out")(nn.swish(embedded))

    def _blocks(self, x: Float[Array, "b n d"], context: tuple) -> Float[Array, "b n d"]:
        cfg, cycle_type = self.config, Cycle
        if cfg.remat != "none":
            cycle_type = nn.remat(Cycle, policy=POLICIES[cfg.remat], prevent_cse=not cfg.scan)
        cycles = cfg.layers // len(cfg.windows)
        if not cfg.scan:
            for cycle in range(cycles):
                x, _ = cycle_type(cfg, self.bounds, name=f"cycle{cycle}")(x, *context)
            return x
        scanned = nn.scan(
            cycle_type,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cycles,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(cfg, self.bounds, name="cycles")(x, *context)[0]
