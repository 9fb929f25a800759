"""DiT's block (Peebles and Xie 2022, figure 3) with the four ways of conditioning that the paper compares."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.denoiser.config import DiTDefaults
from walt_jax.denoiser.parts import Block, Context, embed_label, embed_time, gated, modulate
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class DiTConfig(DiTDefaults):
    """DiT.

    Attributes:
        conditioning: how time and class enter: "adaln_zero"; "adaln", without gates; "in_context", as extra tokens;
            "cross_attention", as keys. Where `cross_attention` is on, text is among those tokens or keys; with adaLN
            each block attends to it, and its mean enters the modulation.
        time_frequencies: of the sinusoids of time: "original", 10000^(-i/n) for i < n; or "diffusers", whose DiT has
            10000^(-i/(n-1)).
        embedders_per_block: whether blocks after the first have their own embedders of time and class, as diffusers'
            class for DiT can have.
    """

    block: Literal["dit"] = "dit"
    conditioning: Literal["adaln_zero", "adaln", "in_context", "cross_attention"] = "adaln_zero"
    time_frequencies: Literal["original", "diffusers"] = "original"
    embedders_per_block: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.embedders_per_block and self.scan:
            raise ValueError("embedders_per_block makes the first block differ: set scan=False")

    @property
    def condition_by(self) -> str:
        return {"in_context": "tokens", "cross_attention": "cross"}.get(self.conditioning, "norm")


class DiTBlock(Block):
    """Attention and an MLP, each after a normalisation that the condition modulates."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        cfg, c, alpha_1, alpha_2 = self.config, context.c, *[jnp.ones((1, 1, 1))] * 2
        if cfg.condition_by != "norm":
            return self._unmodulated(x, context)
        if cfg.embedders_per_block and not self.first:
            time, label = context.embedded
            c = embed_time(cfg, time) + (embed_label(self, cfg, label) if cfg.classes else 0)
        if cfg.conditioning == "adaln_zero":
            gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.adaln(context, 6, c)
        else:
            gamma_1, beta_1, gamma_2, beta_2 = self.adaln(context, 4, c)

        h = modulate(self.norm(x), gamma_1, beta_1)
        x = stored(x + gated(alpha_1, self.attend("self_attention", h, context)))
        if cfg.cross_attention:
            x = stored(x + self.cross_attend(self.norm(x), context))
        h = modulate(self.norm(x), gamma_2, beta_2)
        return stored(x + gated(alpha_2, self.mlp(h)))

    def _unmodulated(self, x: Array, context: Context) -> Array:
        """With extra tokens in `context`, or keys of cross-attention."""
        x = stored(x + self.attend("self_attention", self.affine_norm("self_attention_norm", x), context))
        if context.text is not None:
            x = stored(x + self.cross_attend(self.affine_norm("cross_norm", x), context))
        return stored(x + self.mlp(self.affine_norm("mlp_norm", x)))
