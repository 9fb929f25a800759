"""U-ViT's block (Bao et al. 2022): time, class or text and patches are all tokens, and long skips join the halves."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import normal
from jaxtyping import Array, Float

from walt_jax.denoiser.config import DenoiserConfig, Inits
from walt_jax.denoiser.parts import Block, Context, linear
from walt_jax.layers import stored


@dataclasses.dataclass(frozen=True)
class UViTConfig(DenoiserConfig):
    """U-ViT. Text, if there is any, is among the tokens in place of a class.

    Attributes:
        output_conv: whether a 3 × 3 convolution over each frame's latents comes last, as in all sizes but H.
    """

    block: Literal["uvit"] = "uvit"
    relative: Literal["none", "rotary"] = "none"
    qk_norm: bool = False
    cross_attention: Literal[False] = False
    self_conditioning: bool = False
    learned_sigma: Literal[False] = False  # which the convolution would mix with the prediction
    scan: Literal[False] = False  # skips reach from block to block
    output_conv: bool = False

    attention_bias = "out"
    condition_by = "tokens"
    embeds_time = False
    skips = True
    norm_epsilon = 1e-5
    # The paper's truncated normal distribution is cut at ±2, which are 100 standard deviations.
    inits = Inits(*3 * [normal(0.02)], label=normal(1.0), output=normal(0.02))

    def __post_init__(self):
        super().__post_init__()
        if self.layers // len(self.windows) % 2 == 0:
            raise ValueError(f"skips need a block in the middle: layers={self.layers} should be odd times the windows")

    @property
    def reads_text(self) -> bool:
        return not self.classes


class UViTBlock(Block):
    """A pre-norm transformer block; those of the second half begin with a skip."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Context, skip: Array | None = None) -> Float[Array, "b n d"]:
        if skip is not None:
            x = linear(self.config, "skip", self.config.dim)(jnp.concatenate([x, skip], axis=-1))
        x = stored(x + self.attend("self_attention", self.affine_norm("self_attention_norm", x), context))
        return stored(x + self.mlp(self.affine_norm("mlp_norm", x), approximate=False))
