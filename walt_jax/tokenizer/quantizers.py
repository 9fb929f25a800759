"""Heads: what is between the encoder and the decoder, from W.A.L.T's continuous latents to MAGVIT-v2's codes."""

import dataclasses
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from walt_jax.config import Fraction, Positive
from walt_jax.layers import along_channels

LARGEST_INDEX = 2**31 - 1
DEAD = 0.03  # a VQ code that is used less than this share of its fair share starts anew


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What the encoder's output becomes before it is decoded.

    Attributes:
        name: "continuous" passes it on (W.A.L.T). "kl" draws from a Gaussian around it. "lfq" takes its signs
            (lookup-free quantisation, MAGVIT-v2). "fsq" rounds it (Mentzer et al. 2023). "vq" takes the nearest code
            of a codebook that follows the encoder as a moving average (van den Oord et al. 2017).
        groups: lfq: a position's channels are split into so many indices; MAGVIT-v2 factorises 2^18 codes into two of
            2^9 for token models.
        temperature: lfq: τ of the soft assignment that the entropy penalty is of, p(+1) = σ(4z/τ).
        levels: fsq: values that each channel takes.
        codes: vq: size of the codebook.
        decay: vq: of the codebook's moving average.
    """

    name: Literal["continuous", "kl", "lfq", "fsq", "vq"] = "continuous"
    groups: Positive = 1
    temperature: float = 1.0
    levels: tuple[Positive, ...] = ()
    codes: Positive | None = None
    decay: Fraction = 0.99

    def __post_init__(self):
        readers = {"groups": "lfq", "temperature": "lfq", "levels": "fsq", "codes": "vq", "decay": "vq"}
        for knob, of in readers.items():
            if getattr(self, knob) != getattr(HeadConfig, knob) and self.name != of:
                raise ValueError(f"{knob} is for the head {of!r}, not for {self.name!r}")
        if self.name == "fsq" and (not self.levels or min(self.levels) < 2):
            raise ValueError("the head 'fsq' needs levels of at least 2, such as (8, 8, 8, 5, 5, 5)")
        if self.name == "vq" and self.codes is None:
            raise ValueError("the head 'vq' needs codes, the size of its codebook")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} is not above 0")

    def check(self, channels: int) -> None:
        """Checks the head against the number of latent channels.

        Raises:
            ValueError: if they don't fit.
        """
        if self.name == "lfq" and channels % self.groups:
            raise ValueError(f"head.groups={self.groups} does not divide latent_channels={channels}")
        if self.name == "fsq" and len(self.levels) != channels:
            raise ValueError(f"head.levels has {len(self.levels)} entries and latent_channels is {channels}")
        if self.group_codes(channels) and math.prod(self.group_codes(channels)) > LARGEST_INDEX:
            raise ValueError("the head has 2^31 codes or more; make levels, codes or latent_channels smaller")

    def inputs(self, channels: int) -> int:
        """How many channels the encoder has to make for `channels` of latents."""
        return 2 * channels if self.name == "kl" else channels

    def group_codes(self, channels: int) -> tuple[int, ...]:
        """How many values each of a position's indices takes; () for heads without."""
        return {
            "lfq": (2 ** (channels // self.groups),) * self.groups,
            "fsq": (math.prod(self.levels),),
            "vq": (self.codes or 0,),
        }.get(self.name, ())


class Quantized(NamedTuple):
    """What a head makes.

    Attributes:
        latents: what is decoded.
        indices: the codes, or None where there are none.
        penalties: unweighted losses by name: "kl", "commitment", "entropy".
    """

    latents: Float[Array, "b t h w c"]
    indices: Int[Array, "b t h w g"] | None
    penalties: dict[str, Float[Array, ""]]


def straight_through(quantized: Array, z: Array) -> Array:
    """`quantized`, exactly, with the gradient going to z as if nothing had been rounded."""
    return jax.lax.stop_gradient(quantized) + (z - jax.lax.stop_gradient(z))


def commitment(z: Array, quantized: Array) -> Float[Array, ""]:
    return jnp.square(z - jax.lax.stop_gradient(quantized)).mean()


def lfq_entropy(z: Float[Array, "*n c"], groups: int, temperature: float) -> Float[Array, ""]:
    """E[H(q)] - H[E q]: each position sure of its code, all codes in use; MAGVIT-v2's L_entropy, summed over groups.

    A position's q is a product over its bits, so the first term is exact bit by bit; the second is over all codes of a
    group, which takes memory in proportion to positions × 2^(c / groups).
    """
    logits = rearrange(4 * z / temperature, "... (g bits) -> (...) g bits", g=groups)
    on = jax.nn.sigmoid(logits)
    surprise = on * jax.nn.softplus(-logits) + (1 - on) * jax.nn.softplus(logits)
    each = surprise.sum(axis=(1, 2)).mean()
    codes = jnp.ones((*on.shape[:2], 1))
    for bit in range(on.shape[-1]):
        p = on[..., bit, None]
        codes = jnp.concatenate([codes * (1 - p), codes * p], axis=-1)
    average = codes.mean(axis=0)
    return each + (average * jnp.log(average + 1e-9)).sum()


def lfq(z: Float[Array, "b t h w c"], config: HeadConfig) -> Quantized:
    """Signs, ±1; bit i of a group's index is 1 where its channel i is above 0."""
    signs = jnp.where(z > 0, 1.0, -1.0)
    bits = rearrange(z > 0, "b t h w (g bits) -> b t h w g bits", g=config.groups)
    indices = (bits * along_channels(2 ** jnp.arange(bits.shape[-1]))[None]).sum(-1)
    penalties = {
        "commitment": commitment(z, signs),
        "entropy": lfq_entropy(z, config.groups, config.temperature),
    }
    return Quantized(straight_through(signs, z), indices, penalties)


def lfq_lookup(indices: Int[Array, "b t h w g"], channels: int) -> Float[Array, "b t h w c"]:
    bits = indices[..., None] >> along_channels(jnp.arange(channels // indices.shape[-1]))[None] & 1
    return rearrange(2.0 * bits - 1, "b t h w g bits -> b t h w (g bits)")


def fsq(z: Float[Array, "b t h w c"], config: HeadConfig) -> Quantized:
    """Channel i is squashed and rounded to one of levels[i] values, evenly spaced in -1..1 (Mentzer et al. 2023)."""
    levels = along_channels(jnp.array(config.levels))
    # A little more than half the range, or a channel of two levels could not be shifted by half a level.
    half, offset = (levels - 1) / 2 + 5e-4, jnp.where(levels % 2 == 0, 0.5, 0.0)
    bounded = jnp.tanh(z + jnp.arctanh(offset / half)) * half - offset
    rounded = jnp.round(bounded)
    indices = ((rounded.astype(jnp.int32) + levels // 2) * fsq_basis(config)).sum(-1, keepdims=True)
    return Quantized(straight_through(rounded, bounded) / (levels // 2), indices, {})


def fsq_basis(config: HeadConfig) -> Int[Array, "1 1 1 1 c"]:
    """What a step in each channel adds to the index."""
    return along_channels(jnp.array(np.cumprod((1, *config.levels[:-1]))))


def fsq_lookup(indices: Int[Array, "b t h w 1"], config: HeadConfig) -> Float[Array, "b t h w c"]:
    levels = along_channels(jnp.array(config.levels))
    half = levels // 2
    return (indices // fsq_basis(config) % levels - half) / half


def gaussian(z: Float[Array, "b t h w 2*c"], noise: Float[Array, "b t h w c"] | None) -> Quantized:
    """A draw from N(mean, exp(log variance)), or the mean; z has the means and then the log variances."""
    mean, log_variance = jnp.split(z, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -30, 20)
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    latents = mean if noise is None else mean + jnp.exp(log_variance / 2) * noise
    return Quantized(latents, None, {"kl": kl})


class Codebook(nn.Module):
    """The codes of "vq": moving averages of the encodings that chose them, in the collection "codebook".

    A code that hardly any encoding chooses takes the place of an encoding drawn at random, and so do all codes at the
    first step: codes can't die out (VideoGPT's restarts).
    """

    codes: int
    features: int
    decay: float

    def setup(self):
        self.sums = self.variable("codebook", "sums", jnp.zeros, (self.codes, self.features))
        self.counts = self.variable("codebook", "counts", jnp.zeros, (self.codes,))

    def vectors(self) -> Float[Array, "k c"]:
        return self.sums.value / jnp.maximum(self.counts.value, 1e-6)[:, None]

    def __call__(self, z: Float[Array, "b t h w c"], train: bool) -> Quantized:
        flat = z.reshape(-1, self.features)
        learning = train and not self.is_initializing()
        if learning:
            # Before the search, so that the first step's encodings find codes.
            self._restart(flat)
        vectors = self.vectors()
        distances = jnp.square(vectors).sum(-1)[None] - 2 * flat @ vectors.T
        chosen = distances.argmin(-1)
        quantized = vectors[chosen].reshape(z.shape)
        if learning:
            keep = self.decay
            data = jax.lax.stop_gradient(flat)
            counts, sums = (jax.ops.segment_sum(a, chosen, self.codes) for a in (jnp.ones(len(data)), data))
            self.counts.value = keep * self.counts.value + (1 - keep) * counts
            self.sums.value = keep * self.sums.value + (1 - keep) * sums
        indices = chosen.reshape(*z.shape[:-1], 1)
        return Quantized(straight_through(quantized, z), indices, {"commitment": commitment(z, quantized)})

    def _restart(self, flat: Float[Array, "n c"]) -> None:
        fair = len(flat) / self.codes
        dead = self.counts.value < DEAD * fair
        rows = jax.random.randint(self.make_rng("latent"), (self.codes,), 0, len(flat))
        fresh = jax.lax.stop_gradient(flat)[rows]
        self.sums.value = jnp.where(dead[:, None], fresh * fair, self.sums.value)
        self.counts.value = jnp.where(dead, fair, self.counts.value)


class Head(nn.Module):
    """The head that `HeadConfig` names.

    Attributes:
        config: see `HeadConfig`.
        channels: of the latents that are decoded.
    """

    config: HeadConfig
    channels: int

    def setup(self):
        if self.config.name == "vq":
            self.codebook = Codebook(self.config.codes, self.channels, self.config.decay)

    def noise(self, shape: tuple[int, ...]) -> Float[Array, "b t h w c"] | None:
        """What "kl" adds to latents of this shape in training, of the random stream "latent"; None of other heads."""
        return jax.random.normal(self.make_rng("latent"), shape) if self.config.name == "kl" else None

    def __call__(
        self, z: Float[Array, "b t h w i"], train: bool = False, noise: Float[Array, "b t h w c"] | None = None
    ) -> Quantized:
        """In training "kl" adds noise, its own where none is passed, and "vq" moves its codes, see `Codebook`."""
        name = self.config.name
        if name == "lfq":
            return lfq(z, self.config)
        if name == "fsq":
            return fsq(z, self.config)
        if name == "vq":
            return self.codebook(z, train)
        if name == "kl":
            if train and noise is None:
                noise = self.noise((*z.shape[:-1], self.channels))
            return gaussian(z, noise if train else None)
        return Quantized(z, None, {})

    def lookup(self, indices: Int[Array, "b t h w g"]) -> Float[Array, "b t h w c"]:
        """The latents of codes.

        Raises:
            ValueError: if the head has no codes.
        """
        name = self.config.name
        if name == "lfq":
            return lfq_lookup(indices, self.channels)
        if name == "fsq":
            return fsq_lookup(indices, self.config)
        if name == "vq":
            return self.codebook.vectors()[indices[..., 0]]
        raise ValueError(f"the head {name!r} has no codes to look up")


def joint_index(indices: Int[Array, "*n g"], group_codes: tuple[int, ...]) -> Int[Array, " *n"]:
    """One index a position, of all its groups' indices."""
    index = jnp.zeros(indices.shape[:-1], jnp.int32)
    for group, codes in enumerate(group_codes):
        index = index * codes + indices[..., group]
    return index


def code_statistics(indices: Int[Array, "b t h w g"], group_codes: tuple[int, ...]) -> dict[str, Float[Array, ""]]:
    """How evenly codes are used in a batch.

    Returns:
        "code_perplexity", exp of the entropy of the codes' frequencies, and "code_usage", distinct codes over the most
        that there could be: the codes there are, or the batch's positions if these are fewer.
    """
    flat = joint_index(indices, group_codes).ravel()
    _, counts = jnp.unique(flat, return_counts=True, size=flat.size, fill_value=-1)
    share = counts / flat.size
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0).sum()
    most = min(math.prod(group_codes), flat.size)
    return {"code_perplexity": jnp.exp(entropy), "code_usage": (counts > 0).sum() / most}
