"""What the papers' blocks are made of."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from walt_jax.denoiser.attention import ExtraTokens, WindowAttention
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Grid, Layout
from walt_jax.denoiser.sinusoids import TIME_WAVES, sinusoids, timestep_embedding
from walt_jax.denoiser.windows import Window
from walt_jax.layers import Linear, flat
from walt_jax.parallel.rules import gathered

ZEROS = nn.initializers.zeros
GUIDANCE_WAVES, GUIDANCE_PHASE = 32, 16.0  # numbers in 0..1 as angles up to 16, so that 0.1 more is another input


def linear(config: DenoiserConfig, name: str, features: int, *axes: str, **changed: Any) -> Linear:
    """A layer with the family's initialisation; it belongs to the module that calls this."""
    changed = {"kernel_init": config.inits.hidden, **changed}
    return Linear(features, axes or ("embed", "embed_out"), dtype=jnp.dtype(config.dtype), name=name, **changed)


def layer_norm(x: Float[Array, "b n d"], dtype: Any, epsilon: float = 1e-6) -> Float[Array, "b n d"]:
    """LayerNorm without parameters: scale and shift come from the condition."""
    rows = flat(x.astype(jnp.float32))
    mean = rows.mean(-1, keepdims=True)
    variance = jnp.square(rows - mean).mean(-1, keepdims=True)
    return ((rows - mean) / jnp.sqrt(variance + epsilon)).astype(dtype).reshape(x.shape)


def modulate(x: Float[Array, "b n d"], scale: Array, shift: Array) -> Float[Array, "b n d"]:
    """x (1 + scale) + shift in float32: gradients of scale and shift are sums over a clip's tokens."""
    wide, scale, shift = (values.astype(jnp.float32) for values in (x, scale, shift))
    return (wide * (1 + scale) + shift).astype(x.dtype)


def gated(gate: Array, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """gate · x in float32, for the same reason."""
    return (gate.astype(jnp.float32) * x.astype(jnp.float32)).astype(x.dtype)


class AffineNorm(nn.Module):
    """LayerNorm with a learned scale and shift."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        zeros = nn.with_logical_partitioning(ZEROS, ("embed",))
        scale, bias = self.param("scale", ones, x.shape[-1:]), self.param("bias", zeros, x.shape[-1:])
        x = layer_norm(x, jnp.float32, self.epsilon) * scale[None, None] + bias[None, None]
        return x.astype(self.dtype)


def embed_time(config: DenoiserConfig, time: Float[Array, "b s"], name: str = "time") -> Float[Array, "b s d"]:
    """Two layers on the sinusoids of a time, 0..1; they belong to the module that calls this."""
    init, x = config.inits.embedder, timestep_embedding(time, TIME_WAVES, config.time_frequencies == "diffusers")
    x = nn.swish(linear(config, f"{name}_in", config.dim, "embed", "mlp", kernel_init=init)(x))
    return linear(config, f"{name}_out", config.dim, "embed", "mlp", kernel_init=init)(x)


def embed_step(config: DenoiserConfig, length: Float[Array, "b s"], guidance: Float[Array, "b s 3"]) -> Array:
    """Two layers on the sinusoids of a step's length in time and of guidance, [b, s, d]; the second starts at zero.

    So a model that starts from one without these inputs is that model at first. They belong to the module that calls
    this.
    """
    waves = sinusoids(GUIDANCE_PHASE * guidance, GUIDANCE_WAVES)
    x = [timestep_embedding(length, TIME_WAVES), waves.reshape(*length.shape, 3 * GUIDANCE_WAVES)]
    x = linear(config, "step_in", config.dim, "embed", "mlp", kernel_init=config.inits.embedder)(jnp.concatenate(x, -1))
    return linear(config, "step_out", config.dim, "embed", "mlp", kernel_init=ZEROS)(nn.swish(x))


def embed_label(module: nn.Module, config: DenoiserConfig, label: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """The row of a table of classes, the last one for none; it belongs to the module."""
    init = nn.with_logical_partitioning(config.inits.label, ("vocab", "embed"))
    table = module.param("label_embedding", init, (config.classes + 1, config.dim))
    return gathered(table, ("vocab", "embed"), table.dtype)[label].astype(jnp.dtype(config.dtype))


def single_table(module: nn.Module, name: str, config: DenoiserConfig, count: int) -> Float[Array, "1 1 k"]:
    """adaLN-single's table of `count` vectors; it belongs to the module."""
    init = nn.with_logical_partitioning(nn.initializers.normal(config.dim**-0.5), ("mlp",))
    return module.param(name, init, (count * config.dim,)).astype(jnp.dtype(config.dtype))[None, None]


@flax.struct.dataclass
class Context:
    """What all blocks are conditioned on.

    Attributes:
        layout: where the tokens are.
        embedded: each clip's time and label.
        c: the embedding of both and of the text's mean, c + t of W.A.L.T; None where tokens or keys have them.
        shared: the modulation that blocks have in common, `shared_vectors` of the config.
        text, text_mask: keys of cross-attention, and which of them are there.
        extra: tokens that stand after the clips', see `attention.ExtraTokens`.
        time: the "sincos" embedding of each token's time, for the first block that spans time.
    """

    layout: Layout
    embedded: tuple[Float[Array, "b s"], Int[Array, "b s"] | None]
    c: Float[Array, "b s d"] | None = None
    shared: Float[Array, "b s k"] | None = None
    text: Float[Array, "b s m d"] | None = None
    text_mask: Bool[Array, "b s m"] | None = None
    extra: ExtraTokens | None = None
    time: Float[Array, "b n d"] | None = None


class Block(nn.Module):
    """What the families' blocks have in common.

    Attributes:
        config: the family's.
        windows: the block's, as `DenoiserConfig.block_windows` gives them.
        bounds: tokens along (t, h, w) of the largest clip.
        first: whether it is the first block of all.
    """

    config: Any
    windows: tuple[Window, ...]
    bounds: Grid
    first: bool = False

    def affine_norm(self, name: str, x: Float[Array, "b n d"], epsilon: float | None = None) -> Float[Array, "b n d"]:
        return AffineNorm(jnp.dtype(self.config.dtype), epsilon or self.config.norm_epsilon, name=name)(x)

    def norm(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return layer_norm(x, jnp.dtype(self.config.dtype))

    def attention(self, name: str, windows: tuple[Window, ...], out_init: Any = None) -> WindowAttention:
        cfg, bounds = self.config, tuple(window.bounds(self.bounds) for window in windows)
        inits, dtype = (cfg.inits.qkv, out_init or cfg.inits.hidden), jnp.dtype(cfg.dtype)
        options = cfg.relative, cfg.qk_norm, cfg.attention_bias, dtype
        return WindowAttention(cfg.heads, windows, bounds, *options, *inits, name=name)

    def attend(self, name: str, x: Array, context: Context, *windows: Window, **changed: Any) -> Array:
        """Self-attention in windows, extra tokens included."""
        attention = self.attention(name, windows or self.windows, **changed)
        return attention(x, context.layout, isolate_images=self.config.isolate_images, extra=context.extra)

    def cross_attend(self, x: Array, context: Context, *windows: Window, **changed: Any) -> Array:
        """Attention to text and, if there is a window, to its tokens."""
        attention = self.attention("cross_attention", windows, **changed)
        return attention(x, context.layout, context.text, context.text_mask)

    def mlp(self, x: Float[Array, "b n d"], approximate: bool = True) -> Float[Array, "b n d"]:
        cfg = self.config
        x = linear(cfg, "mlp_in", round(cfg.mlp_ratio * cfg.dim), "embed", "mlp")(x)
        return linear(cfg, "mlp_out", cfg.dim, "mlp", "embed")(nn.gelu(x, approximate=approximate))

    def adaln(self, context: Context, count: int, c: Array | None = None) -> list[Array]:
        """adaLN (DiT): `count` vectors for each token, by a layer of the block's own that starts at zero."""
        layer = linear(self.config, "adaln", count * self.config.dim, "embed", "mlp", kernel_init=ZEROS)
        return self.for_tokens(layer(nn.swish(context.c if c is None else c)), context)

    def adaln_single(self, context: Context) -> list[Array]:
        """adaLN-single (PixArt-α): those that all blocks share, and a table of the block's own."""
        table = single_table(self, "adaln_table", self.config, self.config.shared_vectors)
        return self.for_tokens(context.shared + table, context)

    def for_tokens(self, values: Float[Array, "b s k"], context: Context) -> list[Array]:
        """Each token's vectors from those of its clip."""
        vectors = jnp.split(values, values.shape[-1] // self.config.dim, axis=-1)
        return [context.layout.spread(vector) for vector in vectors]
