"""Latte's block in its four variants (Ma et al. 2024, figure 2); ViViT's models 3 and 4 (Arnab et al. 2021)."""

import dataclasses
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from walt_jax.denoiser.config import DiTDefaults
from walt_jax.denoiser.parts import Block, Context, gated, modulate
from walt_jax.denoiser.windows import Window
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class LatteConfig(DiTDefaults):
    """Latte. Its text-to-video model (`cross_attention`) has adaLN-single.

    Attributes:
        split: what the spatial and the temporal window are for: "blocks", alternating (variant 1) or all spatial ones
            first (variant 2); the "attentions" of each block (variant 3); or halves of a block's "heads" (variant 4).
    """

    block: Literal["latte"] = "latte"
    split: Literal["blocks", "attentions", "heads"] = "blocks"

    def __post_init__(self):
        super().__post_init__()
        if self.split == "heads" and self.heads % len(self.windows):
            raise ValueError(f"split='heads': {len(self.windows)} windows do not divide heads={self.heads}")

    @property
    def single(self) -> bool:
        return self.cross_attention

    @property
    def vectors(self) -> int:
        return 3 * (1 + (len(self.windows) if self.split == "attentions" else 1))

    @property
    def shared_vectors(self) -> int:
        return self.vectors if self.single else 0

    def cross_at(self, windows: tuple[Window, ...]) -> bool:
        """Whether a block attends to text: spatial ones do, where windows are for blocks."""
        return self.cross_attention and (self.split != "blocks" or windows[0].time == 1)


class LatteBlock(Block):
    """DiT's block with attention in space, in time, or in both."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        cfg = self.config
        values = iter(self.adaln_single(context) if cfg.single else self.adaln(context, cfg.vectors))

        attentions = [(window,) for window in self.windows] if cfg.split == "attentions" else [self.windows]
        for number, windows in enumerate(attentions):
            gamma, beta, alpha = next(values), next(values), next(values)
            h = modulate(self.norm(x), gamma, beta)
            name = f"self_attention_{number}" if number else "self_attention"
            x = stored(x + gated(alpha, self.attend(name, h, context, *windows)))
        if cfg.cross_at(self.windows):
            x = stored(x + self.cross_attend(x, context))
        gamma, beta, alpha = values
        h = modulate(self.norm(x), gamma, beta)
        return stored(x + gated(alpha, self.mlp(h)))
