"""A video tokenizer from an image tokenizer: equal on first frames, and on the last frame of each latent frame."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig

# Which temporal tap of a video kernel the image kernel becomes; the others are zero. MAGVIT-v2 takes the last, which a
# causal convolution puts on the frame itself; MAGVIT the central one.
Placement = Literal["last", "central"]


def inflate(images: Any, config: TokenizerConfig, placement: Placement = "last") -> Any:
    """The video tokenizer that does with each frame what the image tokenizer does.

    Upsampling in time repeats: each of the frames that a latent frame makes gets the image's channels.

    Args:
        images: variables of `Tokenizer(config.of_images())`.
        config: of the video tokenizer.
        placement: see `Placement`.
    """
    _, height, width = config.strides
    video = jax.ShapeDtypeStruct((1, 1, height, width, 3), jnp.float32)
    like = nn.meta.unbox(jax.eval_shape(Tokenizer(config).init, jax.random.key(0), video))

    def grow(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
        repeats = like.shape[-1] // leaf.shape[-1]
        leaf = jnp.tile(leaf, (1,) * (leaf.ndim - 1) + (repeats,))
        if leaf.shape == like.shape:
            return leaf
        tap = like.shape[0] - 1 if placement == "last" else like.shape[0] // 2
        return jnp.zeros(like.shape, like.dtype).at[tap].set(leaf[0])

    return jax.tree.map(grow, images, like)
