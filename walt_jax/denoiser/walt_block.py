"""W.A.L.T's block (Gupta et al. 2023, figure 2 and section 3.2)."""

import dataclasses
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from walt_jax.config import Positive
from walt_jax.denoiser.config import FRAME, DenoiserConfig
from walt_jax.denoiser.parts import ZEROS, Block, Context, gated, linear, modulate
from walt_jax.denoiser.windows import Window
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class WaltConfig(DenoiserConfig):
    """W.A.L.T.

    Attributes:
        adaln_rank: r of AdaLN-LoRA, 2 in the paper; None is a modulation layer in each block (its ImageNet model).
        upscale: above 1, the input has low-resolution latents, upscaled so many times (super-resolution stages).
    """

    block: Literal["walt"] = "walt"
    adaln_rank: Positive | None = 2
    upscale: Positive = 1

    @property
    def shared_vectors(self) -> int:
        return 6 if self.adaln_rank else 0

    @property
    def attention_windows(self) -> tuple[Window, ...]:
        return tuple(dict.fromkeys((*super().attention_windows, *self.text_windows)))

    @property
    def text_windows(self) -> tuple[Window, ...]:
        return (FRAME,) if self.cross_attention else ()

    @property
    def text_alone(self) -> bool:
        return False


class WaltBlock(Block):
    """Attention in a spatial or spatiotemporal window, spatial cross-attention, MLP."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context) -> Float[Array, "b n d"]:
        cfg = self.config
        if cfg.adaln_rank:
            # A_i = A_1 + W_b W_a (c + t). The paper's first block has A_1 alone; here all blocks are alike.
            h = linear(cfg, "adaln_a", cfg.adaln_rank, "embed", "rank", use_bias=False)(context.c)
            h = linear(cfg, "adaln_b", 6 * cfg.dim, "rank", "embed", use_bias=False, kernel_init=ZEROS)(h)
            gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.for_tokens(context.shared + h, context)
        else:
            gamma_1, beta_1, alpha_1, gamma_2, beta_2, alpha_2 = self.adaln(context, 6)

        h = modulate(self.norm(x), gamma_1, beta_1)
        x = stored(x + gated(alpha_1, self.attend("self_attention", h, context)))
        if cfg.cross_attention:  # k = v = concat[q, text], spatial, so that images and video share it
            x = stored(x + self.cross_attend(self.norm(x), context, FRAME))
        h = modulate(self.norm(x), gamma_2, beta_2)
        return stored(x + gated(alpha_2, self.mlp(h)))
