"""A linear path from pixels to latents and back, added to the convolutions: where a small tokenizer starts.

A block of pixels, as large as one latent position, becomes its first principal components over training clips, and
these become the block again. `fit` computes both maps before the first step; they are ordinary parameters from there
on. What encoder and decoder add starts at zero. Not in MAGVIT-v2: its encoder ends in a normalisation that removes
brightness and contrast, and has to learn to represent both otherwise before it learns anything else.
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
# Kernels are relative to it, so that an optimizer's step changes each component alike; and their entries are about
# ENTRY, so that a learning rate that suits convolutions changes the transform slowly: it starts at an optimum.
FIRST_DEVIATION = 0.5
ENTRY = 4.0
REWEIGHTINGS = 3  # of the clips; the weights have settled by then
SMALLEST_DEVIATION = 1 / 255  # a component below a pixel's rounding is not scaled up further
SMALLEST_ERROR = 1e-4  # of a clip's mean squared error: 46 dB; better ones get no more weight
GAINS = (0.1, 0.14, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5)  # tried by `fit`


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


def fold(x: Float[Array, "*n c"], bits: tuple[int, ...]) -> Float[Array, "*n b"]:
    """Values of -1..1 to numbers whose signs are the values' Gray codes: channel i becomes bits[i] channels.

    The sign of a value is its first bit; the second is whether its magnitude is below 1/2, and so on. Neighbouring
    intervals differ in one sign, and every number is a continuous function of the value.
    """
    folded = []
    for channel, count in enumerate(bits):
        rest = x[..., channel]
        for _ in range(count):
            folded.append(rest)
            rest = jnp.maximum(1 - 2 * jnp.abs(rest), -1)
    return jnp.stack(folded, axis=-1)


def unfold(signs: Float[Array, "*n b"], bits: tuple[int, ...]) -> Float[Array, "*n c"]:
    """The centre of the interval, one of 2^bits[i] of equal length, in which `fold` found each value."""
    values, start = [], 0
    for count in bits:
        value = jnp.zeros(signs.shape[:-1], signs.dtype)
        for index in reversed(range(start, start + count)):
            value = signs[..., index] * (1 - value) / 2
        values.append(value)
        start += count
    return jnp.stack(values, axis=-1)


class Analysis(nn.Module):
    """Blocks of pixels to latents; the first frame of a clip has blocks of its own.

    Attributes:
        channels: of the latents.
        strides: pixels of a block in (time, height, width).
        bits: of the latents that each component becomes, see `fold`; () if each component is a latent channel.
    """

    channels: int
    strides: tuple[int, int, int]
    bits: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"], first: bool) -> Float[Array, "b t2 h2 w2 c"]:
        """`first` says whether the chunk begins the clip."""
        components = len(self.bits) or self.channels
        scale = along_channels(jnp.asarray(1 / typical_deviations(components), jnp.float32))
        values = []
        for name, blocks in split_blocks(video, self.strides, first).items():
            size = blocks.shape[-1]
            kernel, bias = _affine(self, name, (size, components), ("pixel", "latent"))
            values.append(blocks @ kernel * (scale / (ENTRY * size)) + along_channels(bias))
        latents = jnp.concatenate(values, axis=1)
        return fold(latents, self.bits) if self.bits else latents


class Synthesis(nn.Module):
    """Latents to blocks of pixels, see `Analysis`."""

    strides: tuple[int, int, int]
    bits: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, latents: Float[Array, "b t2 h2 w2 c"], first: bool) -> Float[Array, "b t h w 3"]:
        """`first` says whether the chunk begins the clip."""
        values = unfold(latents, self.bits) if self.bits else latents
        count, channels = (1 if first else 0), values.shape[-1]
        scaled = values * along_channels(jnp.asarray(typical_deviations(channels), jnp.float32))
        time, p, q = self.strides
        video = []
        for name, part, r in (("first", scaled[:, :count], 1), ("later", scaled[:, count:], time)):
            kernel, bias = _affine(self, name, (channels, 3 * r * p * q), ("latent", "pixel"))
            blocks = part @ kernel / ENTRY + along_channels(bias)
            video.append(rearrange(blocks, "b t h w (r p q c) -> b (t r) (h p) (w q) c", r=r, p=p, q=q))
        return jnp.concatenate(video, axis=1)


def _affine(module: nn.Module, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> tuple[Array, Array]:
    kernel_init = nn.with_logical_partitioning(nn.initializers.normal(ENTRY), axes)
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
    return module.param(f"{name}_kernel", kernel_init, shape), module.param(f"{name}_bias", bias_init, shape[1:])


def principal_components(
    blocks: Float[np.ndarray, "m n"], channels: int, weights: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n c"], Float[np.ndarray, " c"]]:
    """The weighted mean, the `channels` directions of largest variance, and the deviation along each.

    Weights add up to 1. Directions are of length 1, and positive in sum; zeros beyond the n that there are.
    """
    mean = weights @ blocks
    centred = blocks - mean
    variances, directions = np.linalg.eigh((centred.T * weights) @ centred)
    variances, directions = variances[::-1][:channels], directions[:, ::-1][:, :channels]
    directions = directions * np.where(directions.sum(0) < 0, -1, 1)
    missing = channels - len(variances)
    return mean, np.pad(directions, ((0, 0), (0, missing))), np.sqrt(np.pad(np.maximum(variances, 0), (0, missing)))


def clip_weights(blocks: list[Float[np.ndarray, "b _ _"]], channels: int) -> Float[np.ndarray, " b"]:
    """Weights of clips with which principal components reach the best mean PSNR of clips, instead of mean error.

    The mean over clips of log(error) has the gradient of a mean of errors, each weighted by 1 / error: components and
    weights are computed alternately (Rybkin et al. 2021 train with this loss).

    Args:
        blocks: of the first frames and of later ones: clips, positions, values.
        channels: how many components there are.
    """
    clips = len(blocks[0])
    weights, values = np.full(clips, 1 / clips), sum(part[0].size for part in blocks)
    for _ in range(REWEIGHTINGS):
        errors = np.zeros(clips)
        for part in blocks:
            if part.shape[1]:
                rows = np.repeat(weights / part.shape[1], part.shape[1])
                mean, directions, _ = principal_components(part.reshape(-1, part.shape[2]), channels, rows)
                centred = part - mean
                errors += np.square(centred).sum((1, 2)) - np.square(centred @ directions).sum((1, 2))
        weights = 1 / (np.maximum(errors, 0) / values + SMALLEST_ERROR)
        weights /= weights.sum()
    return weights


def best_gains(
    components: Float[np.ndarray, "m c"],
    weights: Float[np.ndarray, " m"],
    decode: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, " c"]:
    """For each channel the gain of `GAINS` with which the decoded values correlate most with the component."""
    explained = []
    for gain in GAINS:
        decoded = decode(components * gain)
        decoded = decoded - weights @ decoded
        variances = weights @ np.square(decoded) * (weights @ np.square(components))
        explained.append(np.square(weights @ (decoded * components)) / np.maximum(variances, 1e-12))
    return np.array(GAINS)[np.argmax(explained, axis=0)]


def fit(
    video: Float[np.ndarray, "b t h w 3"],
    channels: int,
    strides: tuple[int, int, int],
    bits: tuple[int, ...] = (),
    quantize: Callable[[Float[Array, "m 1 1 1 c"]], Float[Array, "m 1 1 1 c"]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of `Analysis` and `Synthesis` with which latents are the principal components of blocks.

    Clips are weighted for the best mean PSNR, see `clip_weights`. Components have mean 0 and variance 1 over their
    blocks. With `quantize` they are scaled further, each to the
    range that loses least. `Synthesis` is the least-squares map from what the head decodes to the blocks.

    Args:
        video: clips in -1..1.
        channels: of the latents.
        strides: pixels of a block in (time, height, width).
        bits: see `Analysis`.
        quantize: what a head that rounds decodes of latents; None for a head that does not round.

    Returns:
        Both modules' parameters, without those of later frames where the clips have one frame each.
    """
    components = len(bits) or channels
    analysis, synthesis, typical = {}, {}, typical_deviations(components)

    def decode(values: np.ndarray) -> np.ndarray:
        if quantize is None:
            return values
        latents = jnp.asarray(values, jnp.float32)[:, None, None, None]
        decoded = unfold(quantize(fold(latents, bits)), bits) if bits else quantize(latents)
        return np.asarray(decoded, np.float64)[:, 0, 0, 0]

    parts = {
        name: np.asarray(rearrange(blocks, "b t h w n -> b (t h w) n"), np.float64)
        for name, blocks in split_blocks(video, strides, True).items()
    }
    weights = clip_weights(list(parts.values()), components)
    for name, blocks in parts.items():
        _, positions, size = blocks.shape
        if not positions:
            continue
        blocks, rows = blocks.reshape(-1, size), np.repeat(weights / positions, positions)
        mean, directions, deviations = principal_components(blocks, components, rows)
        kernel = directions / np.maximum(deviations, SMALLEST_DEVIATION * np.sqrt(size))
        values = (blocks - mean) @ kernel
        gains = 1.0 if quantize is None else best_gains(values, rows, decode)
        kernel, decoded = kernel * gains, decode(values * gains)
        centre = rows @ decoded
        weighted = ((decoded - centre) * rows[:, None]).T
        # Few clips may leave directions without variance: the smallest solution ignores them.
        back = np.linalg.pinv(weighted @ (decoded - centre), 1e-9, hermitian=True) @ weighted @ (blocks - mean)
        analysis[f"{name}_kernel"], analysis[f"{name}_bias"] = kernel * (ENTRY * size * typical), -mean @ kernel
        synthesis[f"{name}_kernel"] = back * (ENTRY / typical[:, None])
        synthesis[f"{name}_bias"] = mean - centre @ back
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (analysis, synthesis))
