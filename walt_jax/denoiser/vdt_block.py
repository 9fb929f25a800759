"""VDT's block (Lu et al. 2023): temporal attention that is not modulated, then DiT's block on each frame."""

import dataclasses
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from walt_jax.denoiser.config import FRAME, TIME, DiTDefaults, WindowSizes
from walt_jax.denoiser.parts import Block, Context, gated, linear, modulate
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class VDTConfig(DiTDefaults):
    """VDT. Observed latents take the place of noisy ones (its unified mask modelling)."""

    block: Literal["vdt"] = "vdt"
    windows: tuple[WindowSizes, WindowSizes] = (TIME, FRAME)

    split = "attentions"
    observed_as = "place"


class VDTBlock(Block):
    """Temporal attention, spatial attention with adaLN-Zero, MLP with adaLN-Zero."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.adaln(context, 6)
        time, frame = self.windows

        h = self.affine_norm("temporal_norm", x, epsilon=1e-5)
        h = self.attend("temporal_attention", h, context, time)
        x = stored(x + linear(self.config, "temporal_out", self.config.dim)(h))

        h = modulate(self.norm(x), gamma_1, beta_1)
        x = stored(x + gated(alpha_1, self.attend("self_attention", h, context, frame)))
        if self.config.cross_attention:  # not in the paper, which has no text
            x = stored(x + self.cross_attend(self.norm(x), context))
        h = modulate(self.norm(x), gamma_2, beta_2)
        return stored(x + gated(alpha_2, self.mlp(h)))
