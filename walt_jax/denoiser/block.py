"""A block of the denoiser: attention in windows, cross-attention, an MLP, each told of the condition by its norm."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from walt_jax.denoiser.attention import Beside, WindowAttention
from walt_jax.denoiser.config import CROSS_WINDOW, DenoiserConfig
from walt_jax.denoiser.layout import Grid, Layout
from walt_jax.denoiser.sinusoids import TIME_WAVES, timestep_embedding
from walt_jax.denoiser.windows import Window
from walt_jax.layers import Linear, stored


def layer_norm(x: Float[Array, "b n d"], dtype: jnp.dtype) -> Float[Array, "b n d"]:
    """LayerNorm without parameters: scale and shift come from the condition."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) / jnp.sqrt(variance + 1e-6)).astype(dtype)


def modulate(x: Float[Array, "b n d"], scale: Array, shift: Array) -> Float[Array, "b n d"]:
    return x * (1 + scale) + shift


class AffineNorm(nn.Module):
    """LayerNorm with a scale and a shift of its own."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        scale, bias = self.param("scale", ones, x.shape[-1:]), self.param("bias", zeros, x.shape[-1:])
        x = layer_norm(x, jnp.dtype("float32")) * scale[None, None] + bias[None, None]
        return x.astype(self.dtype)


def embedded_time(config: DenoiserConfig, time: Float[Array, "b s"], name: str = "time") -> Float[Array, "b s d"]:
    """Two layers on the waves of a time, 0..1; they belong to the module that calls this."""
    dtype = jnp.dtype(config.dtype)
    waves = timestep_embedding(time, TIME_WAVES, closed=config.time_frequencies == "diffusers")
    embedded = Linear(config.dim, dtype=dtype, name=f"{name}_in")(waves)
    return Linear(config.dim, dtype=dtype, name=f"{name}_out")(nn.swish(embedded))


def embedded_label(module: nn.Module, config: DenoiserConfig, label: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """The row of a table of classes, and of none, which belongs to the module."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    table = module.param("label_embedding", init, (config.classes + 1, config.dim))
    return table[label].astype(jnp.dtype(config.dtype))


@flax.struct.dataclass
class Context:
    """What all blocks are given.

    Attributes:
        shared: c + t of the paper: what a clip's tokens share; None where it is told otherwise.
        told: what it was made of, each clip's time and label.
        modulation: of all blocks, "lora" and "single" alone.
        text: what cross-attention looks at.
        text_mask: which of it is there.
        time: the embedding of each token's time, where it is added in the blocks.
        layout: where the tokens are.
        beside: tokens that stand after the clips', see `attention.Beside`.
    """

    shared: Float[Array, "b s d"] | None
    told: tuple[Float[Array, "b s"], Int[Array, "b s"] | None]
    modulation: Float[Array, "b s k"] | None
    text: Float[Array, "b s m d"] | None
    text_mask: Bool[Array, "b s m"] | None
    time: Float[Array, "b n d"] | None
    layout: Layout
    beside: Beside | None


def modulation_width(config: DenoiserConfig) -> int:
    """Values that modulate a block: a scale, a shift and perhaps a gate for each norm, of `dim` each."""
    attentions = len(config.block_windows[0]) if config.split == "attentions" and config.modulated == "all" else 1
    return (attentions + 1) * (3 if config.gates else 2) * config.dim


class Block(nn.Module):
    """Attention in windows, cross-attention to text in the frame, MLP."""

    config: DenoiserConfig
    windows: tuple[Window, ...]
    bounds: Grid
    first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        modulations = self._modulations(context)

        def normed(name):
            """x, normalised and modulated, and by what to multiply what is made of it."""
            if cfg.adaln == "none":
                return AffineNorm(dtype, name=f"{name}_norm")(x), None
            scale, shift, *gate = next(modulations)
            return modulate(layer_norm(x, dtype), scale, shift), (gate[0] if gate else None)

        def added(y, gate):
            return stored(x + (y if gate is None else gate * y))

        def attention(windows, name):
            bounds = tuple(window.bounds(self.bounds) for window in windows)
            return WindowAttention(
                cfg.heads, windows, bounds, cfg.relative, cfg.qk_norm, cfg.attention_bias, dtype, name=name
            )

        turns = [(window,) for window in self.windows] if cfg.split == "attentions" else [self.windows]
        for number, windows in enumerate(turns):
            name = f"self_attention_{number}" if number else "self_attention"
            last = number == len(turns) - 1
            attend = attention(windows, name)
            if cfg.modulated == "last" and not last:
                # VDT: a plain norm, and one layer more
                y = attend(AffineNorm(dtype, name=f"{name}_norm")(x), context.layout, isolate_images=cfg.isolate_images)
                x = added(Linear(cfg.dim, ("embed", "embed_out"), dtype=dtype, name=f"{name}_out")(y), None)
                continue
            h, gate = normed(name)
            x = added(attend(h, context.layout, isolate_images=cfg.isolate_images, beside=context.beside), gate)

        if cfg.cross_at(self.windows):
            h = x if cfg.adaln == "single" else layer_norm(x, dtype)
            if cfg.adaln == "none":
                h = AffineNorm(dtype, name="cross_norm")(x)
            windows = (CROSS_WINDOW,) if cfg.cross_keys == "joint" else ()
            cross = attention(windows, "cross_attention")
            x = added(cross(h, context.layout, context.text, context.text_mask), None)

        h, gate = normed("mlp")
        h = Linear(round(cfg.mlp_ratio * cfg.dim), ("embed", "mlp"), dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        return added(Linear(cfg.dim, ("mlp", "embed"), dtype=dtype, name="mlp_out")(h), gate)

    def _modulations(self, context: Context):
        """(scale, shift) or (scale, shift, gate) of each norm in turn, for each token."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        if cfg.adaln == "none":
            return iter(())
        width, zeros = modulation_width(cfg), nn.initializers.zeros
        if cfg.adaln == "separate":
            adaln = Linear(width, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln")
            shared = context.shared
            if cfg.told_by == "each" and not self.first:
                time, label = context.told
                shared = embedded_time(cfg, time)
                if label is not None:
                    shared = shared + embedded_label(self, cfg, label)
                shared = nn.swish(shared)
            modulation = adaln(shared)
        elif cfg.adaln == "single":
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.dim**-0.5), ("mlp",))
            modulation = context.modulation + self.param("adaln_table", init, (width,)).astype(dtype)[None, None]
        else:
            # A_i = A_1 + W_b W_a (c + t)
            low = Linear(cfg.adaln_rank, ("embed", "rank"), use_bias=False, dtype=dtype, name="adaln_a")(context.shared)
            modulation = context.modulation + Linear(
                width, ("rank", "embed"), use_bias=False, kernel_init=zeros, dtype=dtype, name="adaln_b"
            )(low)
        values = [context.layout.spread(value) for value in jnp.split(modulation, width // cfg.dim, axis=-1)]
        each = 3 if cfg.gates else 2
        return iter([values[first : first + each] for first in range(0, len(values), each)])


class Cycle(nn.Module):
    """One block for each of the config's windows: the body of the scan."""

    config: DenoiserConfig
    bounds: Grid
    number: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], first: Float[Array, ""] | None, context: Context
    ) -> tuple[Float[Array, "b n d"], None]:
        """`first` is 1 in the first cycle and 0 in later ones; read where time is added in the blocks."""
        late = context.time
        for index, windows in enumerate(self.config.block_windows):
            if late is not None and any(window.time != 1 for window in windows):
                x, late = x + (late * first).astype(x.dtype), None
            lowest = self.number == 0 and index == 0
            x = Block(self.config, windows, self.bounds, lowest, name=f"block{index}")(x, context)
        return x, None
