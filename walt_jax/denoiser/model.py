"""The denoiser: W.A.L.T and its siblings, as their configs say."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from walt_jax.denoiser.attention import Beside
from walt_jax.denoiser.block import (
    AffineNorm,
    Context,
    Cycle,
    embedded_label,
    embedded_time,
    layer_norm,
    modulate,
    modulation_width,
)
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Grid, Layout, from_tokens, to_tokens
from walt_jax.denoiser.sinusoids import sinusoids
from walt_jax.layers import Linear

POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Condition:
    """What a batch's clips are conditioned on; None is what the model has no input for.

    Attributes:
        text: embeddings of m tokens a clip.
        text_mask: which of them are there.
        label: of each clip, 0 … classes - 1; `classes` where it is dropped.
        observed: clean latents where they are given, zeros elsewhere.
        observed_mask: 1 where they are given, a value a latent position.
        low_res: clean low-resolution latents, with noise; of equal clips alone.
        low_res_time: how much noise, as a time.
    """

    text: Float[Array, "b s m e"] | None = None
    text_mask: Bool[Array, "b s m"] | None = None
    label: Int[Array, "b s"] | None = None
    observed: Float[Array, "b n p"] | None = None
    observed_mask: Float[Array, "b n q"] | None = None
    low_res: Float[Array, "b t h w c"] | None = None
    low_res_time: Float[Array, "b s"] | None = None


def fixed_positions(place: Int[Array, "*n"], dim: int) -> Float[Array, "*n d"]:
    """Sines, then cosines, of a place at `dim / 2` frequencies from 1 down to nearly 1/10,000."""
    frequencies = 10_000.0 ** -(jnp.arange(dim // 2) / (dim // 2))
    angles = place[..., None] * jnp.expand_dims(frequencies, tuple(range(place.ndim)))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


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
        """`time` is in 0 (clean) to 1 (noise); `estimate`, of the clean latents, is zeros where there is none.

        With `learned_sigma` there are twice as many values a token, see `diffusion.learned_sigma`.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        patch = noisy.shape[-1]
        inputs = jnp.concatenate(self._inputs(noisy, condition, estimate), axis=-1)
        # Whatever a pack is filled up with: no gradient may become NaN by it.
        inputs = jnp.where(layout.valid()[..., None], inputs, 0)
        x = Linear(cfg.dim, ("latent", "embed"), dtype=dtype, name="patch_in")(inputs)
        places = self._positions(layout).astype(dtype)
        x = x + places

        given, (time, label, text) = (time, condition.label), self._told(time, condition)
        context = Context(None, given, None, None, None, self._late_positions(layout), layout, None)
        if cfg.condition_by == "norm":
            # c + t of the paper: what the whole clip shares, its time and its caption's mean or its label.
            shared = time
            if text is not None:
                mask = condition.text_mask
                weights = mask[..., None] / jnp.maximum(mask.sum(-1), 1)[..., None, None]
                if cfg.adaln != "single":
                    shared = shared + Linear(cfg.dim, dtype=dtype, name="text_pooled")((text * weights).sum(-2))
                context = context.replace(text=text, text_mask=mask)
            if label is not None:
                shared = shared + label
            if cfg.upscale > 1:
                shared = shared + embedded_time(cfg, condition.low_res_time, "low_res_time")
            if cfg.observed_as in ("norm", "cross"):
                observed = Linear(cfg.dim, ("latent", "embed"), dtype=dtype, name="observed_in")(condition.observed)
                there = condition.observed_mask.mean(-1, keepdims=True).astype(dtype)
                if cfg.observed_as == "norm":
                    both = layout.gathered(jnp.concatenate([observed * there, there], axis=-1), time.shape[1])
                    shared = shared + both[..., :-1] / jnp.maximum(both[..., -1:], 1)
                else:
                    observed = observed + places
                    context = context.replace(text=observed[:, None], text_mask=there[:, None, :, 0] > 0)
            told, context = shared, context.replace(shared=nn.swish(shared))
        else:
            words, mask = self._words(time, label, text, condition.text_mask)
            if cfg.condition_by == "cross":
                context = context.replace(text=words, text_mask=mask)
            else:
                context = context.replace(beside=Beside(mask))
                if context.time is not None:
                    behind = (0, words.shape[1] * words.shape[2])
                    context = context.replace(time=jnp.pad(context.time, ((0, 0), behind, (0, 0))))
                x = jnp.concatenate([x, rearrange(words, "b s m d -> b (s m) d")], axis=1)
        zeros, shared = nn.initializers.zeros, context.shared
        if cfg.adaln in ("lora", "single"):
            adaln = Linear(modulation_width(cfg), ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln")
            context = context.replace(modulation=adaln(shared))
        x = self._blocks(x, context)[:, : noisy.shape[1]]

        if cfg.adaln == "none":
            x = AffineNorm(dtype, name="norm_out")(x)
        else:
            if cfg.adaln == "single":
                init = nn.with_logical_partitioning(nn.initializers.normal(cfg.dim**-0.5), ("mlp",))
                table = self.param("adaln_out_table", init, (2 * cfg.dim,)).astype(dtype)
                last = jnp.concatenate([told, told], axis=-1) + table[None, None]
            else:
                last = Linear(2 * cfg.dim, ("embed", "mlp"), kernel_init=zeros, dtype=dtype, name="adaln_out")(shared)
            scale, shift = jnp.split(layout.spread(last), 2, axis=-1)
            x = modulate(layer_norm(x, dtype), scale, shift)
        width = 2 * patch if cfg.learned_sigma else patch
        x = Linear(width, ("embed", "latent"), kernel_init=zeros, dtype=dtype, name="patch_out")(x)
        x = x.astype(jnp.float32)
        return self._convolved(x, layout) if cfg.output_conv else x

    def _told(
        self, time: Float[Array, "b s"], condition: Condition
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"] | None, Float[Array, "b s m d"] | None]:
        """The embeddings of time, label and text, where there are any."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        label = text = None
        if cfg.classes:
            label = embedded_label(self, cfg, condition.label)
        if condition.text is not None:
            text = Linear(cfg.dim, ("text", "embed"), dtype=dtype, name="text_in")(condition.text)
            if cfg.adaln == "single":
                text = nn.gelu(text, approximate=True)
                text = Linear(cfg.dim, ("embed", "embed_out"), dtype=dtype, name="text_out")(text)
        return embedded_time(cfg, time), label, text

    def _words(
        self, time: Array, label: Array | None, text: Array | None, text_mask: Array | None
    ) -> tuple[Float[Array, "b s m d"], Bool[Array, "b s m"]]:
        """Time, label and text as tokens, and which of them are there."""
        given = [each[..., None, :] for each in (time, label) if each is not None]
        places = self.param(
            "word_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed")),
            (len(given), self.config.dim),
        )
        words = jnp.concatenate(given, axis=-2) + places.astype(time.dtype)[None, None]
        mask = jnp.ones(words.shape[:-1], bool)
        if text is not None:
            words, mask = jnp.concatenate([words, text], axis=-2), jnp.concatenate([mask, text_mask], axis=-1)
        return words, mask

    def _convolved(self, x: Float[Array, "b n p"], layout: Layout) -> Float[Array, "b n p"]:
        """U-ViT's last layer, which makes patches meet at their edges."""
        patch = self.config.patch_size
        latents = from_tokens(x, layout.grid, patch)
        channels = latents.shape[-1]
        kernel_init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (None, None, None, "channels", "channels_out")
        )
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("channels_out",))
        conv = nn.Conv(channels, (1, 3, 3), kernel_init=kernel_init, bias_init=bias_init, name="conv_out")
        return to_tokens(conv(latents), patch)

    def _inputs(self, noisy: Array, condition: Condition, estimate: Array | None) -> list[Array]:
        """What a token is made of, beside each other."""
        cfg, inputs = self.config, [noisy]
        if cfg.self_conditioning:
            inputs.append(jnp.zeros_like(noisy) if estimate is None else estimate)
        if cfg.frame_prediction and cfg.observed_as == "channels":
            inputs += [condition.observed, condition.observed_mask]
        elif cfg.observed_as == "place":
            mask = jnp.repeat(condition.observed_mask, noisy.shape[-1] // condition.observed_mask.shape[-1], axis=-1)
            inputs[0] = noisy * (1 - mask) + condition.observed * mask
        if cfg.upscale > 1:
            scale, channels = cfg.upscale, condition.low_res.shape[-1]
            kernel_init = nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, None, None, "latent", "channels_out")
            )
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("channels_out",))
            up = nn.Conv(scale**2 * channels, (1, 3, 3), kernel_init=kernel_init, bias_init=bias_init, name="upscale")(
                condition.low_res
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
        if cfg.positions == "sincos":
            half = cfg.dim // 2
            return jnp.concatenate([fixed_positions(place[..., 2], half), fixed_positions(place[..., 1], half)], -1)
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

    def _late_positions(self, layout: Layout) -> Float[Array, "b n d"] | None:
        """Of time, where it is added in the blocks."""
        if self.config.positions != "sincos" or self.bounds[0] == 1:
            return None
        return fixed_positions(layout.coordinates()[..., 0], self.config.dim)

    def _blocks(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        cfg, cycle_type, dtype = self.config, Cycle, jnp.dtype(self.config.dtype)
        if cfg.remat != "none":
            cycle_type = nn.remat(Cycle, policy=POLICIES[cfg.remat], prevent_cse=not cfg.scan)
        cycles = cfg.layers // len(cfg.block_windows)
        first = np.arange(cycles) == 0
        if not cfg.scan:
            skips = []
            for cycle in range(cycles):
                if cfg.skips and cycle > cycles // 2:
                    both = jnp.concatenate([x, skips.pop()], axis=-1)
                    x = Linear(cfg.dim, ("embed", "embed_out"), dtype=dtype, name=f"skip{cycle}")(both)
                x, _ = cycle_type(cfg, self.bounds, cycle, name=f"cycle{cycle}")(
                    x, first[cycle].astype(np.float32), context
                )
                if cfg.skips and cycle < cycles // 2:
                    skips.append(x)
            return x
        scanned = nn.scan(
            cycle_type,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cycles,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(cfg, self.bounds, name="cycles")(x, jnp.asarray(first, jnp.float32), context)[0]
