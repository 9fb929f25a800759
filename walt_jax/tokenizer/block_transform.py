"""A linear way from pixels to latents and back, beside the convolutions: where a small tokenizer starts.

A block of pixels, as large as one latent position, becomes some of its lowest frequencies in time, space and colour, as
in a video codec's cosine transform (Ahmed et al. 1974), and these the block again. Both maps are learned from there on,
and what encoder and decoder add starts at zero. Not in MAGVIT-v2: its encoder ends in a normalisation, which takes
brightness and contrast away, and has to learn a way around that before it learns anything else.
"""

import itertools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

# Orthogonal, each of length √3 as the frequencies have unit mean square: brightness, then two differences of colours.
COLOURS = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [0.5, -1.0, 0.5]]) * np.sqrt([[1.0], [1.5], [2.0]])
COLOUR_POWER = (1.0, 0.1, 0.1)  # about what differences of colours have of brightness's variance in natural images


def lowest_frequencies(
    sizes: tuple[int, int, int], count: int
) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, " c"]]:
    """The frequencies of a block that have most of the variance, and the deviation that is expected of each.

    Args:
        sizes: of the block in (time, height, width).
        count: how many; zeros beyond the block's 3 · time · height · width.

    Returns:
        Patterns over (time, height, width, colour), mutually orthogonal, of mean square 1; expected deviations for
        pixels in -1..1, falling as 1 over the frequency.
    """
    waves = []
    for size in sizes:
        places = (np.arange(size) + 0.5) / size
        waves.append([np.cos(np.pi * f * places) * (np.sqrt(2) if f else 1) for f in range(size)])
    found = []
    for colour, frequencies in itertools.product(range(3), itertools.product(*map(range, sizes))):
        deviation = 0.5 * np.sqrt(COLOUR_POWER[colour]) / np.sqrt(1 + 4 * np.square(frequencies).sum())
        pattern = np.einsum("t,h,w,c->thwc", *(waves[a][f] for a, f in enumerate(frequencies)), COLOURS[colour])
        found.append((deviation, pattern.ravel()))
    found.sort(key=lambda entry: -entry[0])  # stable: equal ones stay in order
    found = found[:count]
    patterns = np.zeros((3 * int(np.prod(sizes)), count))
    deviations = np.ones(count)
    for index, (deviation, pattern) in enumerate(found):
        patterns[:, index], deviations[index] = pattern, deviation
    return patterns, deviations


class Analysis(nn.Module):
    """Blocks of pixels to latents; the first frame of a clip is a block of its own.

    Attributes:
        channels: of the latents.
        strides: pixels of a block in (time, height, width).
    """

    channels: int
    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"], first: bool) -> Float[Array, "b t2 h2 w2 c"]:
        """`first` says whether the chunk begins the clip."""
        alone = 1 if first else 0
        parts = [(video[:, :alone], "first", 1), (video[:, alone:], "later", self.strides[0])]
        return jnp.concatenate([self._part(*part) for part in parts], axis=1)

    def _part(self, video: Float[Array, "b t h w 3"], name: str, frames: int) -> Float[Array, "b t2 h2 w2 c"]:
        sizes = (frames, *self.strides[1:])
        patterns, deviations = lowest_frequencies(sizes, self.channels)
        kernel = _parameter(self, name, patterns, ("pixel", "latent"))
        r, p, q = sizes
        blocks = rearrange(video, "b (t r) (h p) (w q) c -> b t h w (r p q c)", r=r, p=p, q=q)
        return blocks @ kernel / (len(patterns) * jnp.asarray(deviations, jnp.float32))[None, None, None, None]


class Synthesis(nn.Module):
    """The way back, see `Analysis`."""

    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, latents: Float[Array, "b t2 h2 w2 c"], first: bool) -> Float[Array, "b t h w 3"]:
        """`first` says whether the chunk begins the clip."""
        alone = 1 if first else 0
        parts = [(latents[:, :alone], "first", 1), (latents[:, alone:], "later", self.strides[0])]
        return jnp.concatenate([self._part(*part) for part in parts], axis=1)

    def _part(self, latents: Float[Array, "b t2 h2 w2 c"], name: str, frames: int) -> Float[Array, "b t h w 3"]:
        sizes = (frames, *self.strides[1:])
        patterns, deviations = lowest_frequencies(sizes, latents.shape[-1])
        kernel = _parameter(self, name, patterns.T, ("latent", "pixel"))
        blocks = (latents * jnp.asarray(deviations, jnp.float32)[None, None, None, None]) @ kernel
        r, p, q = sizes
        return rearrange(blocks, "b t h w (r p q c) -> b (t r) (h p) (w q) c", r=r, p=p, q=q)


def _parameter(module: nn.Module, name: str, value: np.ndarray, axes: tuple[str, str]) -> Float[Array, "i o"]:
    def init(key, shape):
        return jnp.asarray(value, jnp.float32)

    return module.param(name, nn.with_logical_partitioning(init, axes), value.shape)
