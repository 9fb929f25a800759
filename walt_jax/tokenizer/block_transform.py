"""A linear path from pixels to latents and back, added to the convolutions: where a small tokenizer starts.

A block of pixels, as large as one latent position, becomes its first principal components over training clips, and
these become the block again. `fit` computes both maps before the first step; they are ordinary parameters from there
on. What encoder and decoder add starts at zero. Not in MAGVIT-v2: its encoder ends in a normalisation that removes
brightness and contrast, and has to learn a way around that before it learns anything else.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from walt_jax.layers import along_channels

# Root mean square over a block's values of the i-th component (from 1) is about 0.5 / i in natural clips of -1..1.
# Kernels are relative to it, so that their entries are about 1 and an optimizer's step changes each component alike.
FIRST_DEVIATION = 0.5
SMALLEST_DEVIATION = 1 / 255  # a component below a pixel's rounding is not scaled up further


def typical_deviations(channels: int) -> Float[np.ndarray, " c"]:
    return FIRST_DEVIATION / np.arange(1, channels + 1)


def split_blocks(
    video: Float[Array, "b t h w 3"], strides: tuple[int, int, int], first: bool
) -> dict[str, Float[Array, "b t2 h2 w2 n"]]:
    """Blocks of the first frame, none unless the chunk begins the clip, and of later ones."""
    count = 1 if first else 0
    _, p, q = strides
    chunks = {"first": (video[:, :count], 1), "later": (video[:, count:], strides[0])}
    return {
        name: rearrange(chunk, "b (t r) (h p) (w q) c -> b t h w (r p q c)", r=r, p=p, q=q)
        for name, (chunk, r) in chunks.items()
    }


class Analysis(nn.Module):
    """Blocks of pixels to latents; the first frame of a clip has blocks of its own.

    Attributes:
        channels: of the latents.
        strides: pixels of a block in (time, height, width).
    """

    channels: int
    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"], first: bool) -> Float[Array, "b t2 h2 w2 c"]:
        """`first` says whether the chunk begins the clip."""
        scale = along_channels(jnp.asarray(1 / typical_deviations(self.channels), jnp.float32))
        latents = []
        for name, blocks in split_blocks(video, self.strides, first).items():
            size = blocks.shape[-1]
            kernel, bias = _affine(self, name, (size, self.channels), ("pixel", "latent"))
            latents.append(blocks @ kernel * (scale / size) + along_channels(bias))
        return jnp.concatenate(latents, axis=1)


class Synthesis(nn.Module):
    """The way back, see `Analysis`."""

    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, latents: Float[Array, "b t2 h2 w2 c"], first: bool) -> Float[Array, "b t h w 3"]:
        """`first` says whether the chunk begins the clip."""
        count, channels = (1 if first else 0), latents.shape[-1]
        scaled = latents * along_channels(jnp.asarray(typical_deviations(channels), jnp.float32))
        time, p, q = self.strides
        video = []
        for name, part, r in (("first", scaled[:, :count], 1), ("later", scaled[:, count:], time)):
            kernel, bias = _affine(self, name, (channels, 3 * r * p * q), ("latent", "pixel"))
            blocks = part @ kernel + along_channels(bias)
            video.append(rearrange(blocks, "b t h w (r p q c) -> b (t r) (h p) (w q) c", r=r, p=p, q=q))
        return jnp.concatenate(video, axis=1)


def _affine(module: nn.Module, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> tuple[Array, Array]:
    kernel_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), axes)
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
    return module.param(f"{name}_kernel", kernel_init, shape), module.param(f"{name}_bias", bias_init, shape[1:])


def principal_components(
    blocks: Float[np.ndarray, "m n"], channels: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n c"], Float[np.ndarray, " c"]]:
    """The mean, the `channels` directions of largest variance, and the deviation along each.

    Directions are of length 1, and positive in sum; zeros beyond the n that there are.
    """
    mean = blocks.mean(0)
    centred = blocks - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(blocks))
    variances, directions = variances[::-1][:channels], directions[:, ::-1][:, :channels]
    directions = directions * np.where(directions.sum(0) < 0, -1, 1)
    missing = channels - len(variances)
    return mean, np.pad(directions, ((0, 0), (0, missing))), np.sqrt(np.pad(np.maximum(variances, 0), (0, missing)))


def fit(
    video: Float[np.ndarray, "b t h w 3"],
    channels: int,
    strides: tuple[int, int, int],
    quantize: Callable[[Float[Array, "m 1 1 1 c"]], Float[Array, "m 1 1 1 c"]] = lambda latents: latents,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of `Analysis` and `Synthesis` with which latents are the principal components of blocks.

    Each latent channel has mean 0 and variance 1 over the clips' blocks. `Synthesis` is the least-squares map from what
    the head makes of the latents to the blocks.

    Args:
        video: clips in -1..1.
        channels: of the latents.
        strides: pixels of a block in (time, height, width).
        quantize: the head: what it decodes of latents.

    Returns:
        Both modules' parameters, without those of later frames where the clips have one frame each.
    """
    analysis, synthesis, typical = {}, {}, typical_deviations(channels)
    for name, blocks in split_blocks(video, strides, True).items():
        blocks = np.asarray(blocks, np.float64).reshape(-1, blocks.shape[-1])
        if not len(blocks):
            continue
        size = blocks.shape[1]
        mean, directions, deviations = principal_components(blocks, channels)
        kernel = directions / np.maximum(deviations, SMALLEST_DEVIATION * np.sqrt(size))
        latents = (blocks - mean) @ kernel
        decoded = np.asarray(quantize(jnp.asarray(latents, jnp.float32)[:, None, None, None]), np.float64)[:, 0, 0, 0]
        centre = decoded.mean(0)
        # Few clips may leave directions without variance: the smallest solution ignores them.
        back = np.linalg.pinv((decoded - centre).T @ (decoded - centre), 1e-9, hermitian=True)
        back = back @ (decoded - centre).T @ (blocks - mean)
        analysis[f"{name}_kernel"], analysis[f"{name}_bias"] = kernel * size * typical, -mean @ kernel
        synthesis[f"{name}_kernel"], synthesis[f"{name}_bias"] = back / typical[:, None], mean - centre @ back
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (analysis, synthesis))
