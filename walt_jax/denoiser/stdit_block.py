"""STDiT's block (Open-Sora 1.0): PixArt-α's (Chen et al. 2023) with temporal attention after the spatial one."""

import dataclasses
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from walt_jax.denoiser.config import FRAME, TIME, DiTDefaults, WindowSizes
from walt_jax.denoiser.parts import ZEROS, Block, Context, gated, modulate
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class STDiTConfig(DiTDefaults):
    """STDiT."""

    block: Literal["stdit"] = "stdit"
    windows: tuple[WindowSizes, WindowSizes] = (FRAME, TIME)

    split = "attentions"
    single = True
    shared_vectors = 6
    time_in_attention = True


class STDiTBlock(Block):
    """Spatial attention, temporal attention, cross-attention to text, MLP."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.adaln_single(context)
        frame, time = self.windows

        h = modulate(self.norm(x), gamma_1, beta_1)
        x = stored(x + gated(alpha_1, self.attend("self_attention", h, context, frame)))
        # Neither normalised nor modulated, and with the spatial attention's gate.
        h = x if context.time is None else x + context.time
        x = stored(x + gated(alpha_1, self.attend("temporal_attention", h, context, time, out_init=ZEROS)))
        if self.config.cross_attention:
            x = stored(x + self.cross_attend(x, context, out_init=ZEROS))
        h = modulate(self.norm(x), gamma_2, beta_2)
        return stored(x + gated(alpha_2, self.mlp(h)))
