"""Classifier-free guidance (Ho and Salimans 2022) as a function of time, with rescaling or projection.

It works on clean estimates: at one z, v, ε and ε − x are each an affine function of x, and x_u + w (x_c − x_u) is an
affine combination, so guiding any of them is guiding all.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from walt_jax.config import Fraction, Range

SMALLEST = 1e-12  # of what is divided by


@dataclass(frozen=True)
class APGConfig:
    """Adaptive projected guidance (Sadat et al. 2024), of the difference Δ = x_c − x_u of the clean estimates.

    Attributes:
        parallel: η, how much is kept of the part of Δ that is parallel to x_c, which saturates colours; 1 is all of it.
        norm: r, which the norm of Δ over a clip is shrunk to where it is larger; 0 is off.
        momentum: β of Δ ← Δ + β · its last value; negative in the paper, so that steps do not repeat each other.
    """

    parallel: Fraction = 0.0
    norm: float = 0.0
    momentum: Annotated[float, Range(-0.99, 0.99)] = 0.0


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly the condition is followed, and at which times.

    Attributes:
        scale: w; 1 is the conditional model, 0 the unconditional one.
        kind: "constant"; "interval", w = scale inside an interval of times and 1 outside (Kynkäänniemi et al. 2024);
            "power_cosine", from 1 at noise to scale at data (MDT, Gao et al. 2023; W.A.L.T's for ImageNet).
        interval: lowest and highest time, 0..1, only of "interval".
        power: only of "power_cosine", 4 in MDT: the higher, the later guidance sets in.
        rescale: φ of Lin et al. 2023, equations 15 and 16, 0 (off) to 1.
        channels: guide only so many of the latents' channels, 3 in DiT's released samplers; 0 is all.
        apg: see `APGConfig`; None is off.
    """

    scale: float = 1.0
    kind: Literal["constant", "interval", "power_cosine"] = "constant"
    interval: tuple[Fraction, Fraction] | None = None
    power: float | None = None
    rescale: Fraction = 0.0
    channels: int = 0
    apg: APGConfig | None = None

    def __post_init__(self):
        for knob, kind in (("interval", "interval"), ("power", "power_cosine")):
            is_set = getattr(self, knob) is not None
            if is_set and self.kind != kind:
                raise ValueError(f"{knob} is read only by kind {kind!r}; leave it out for {self.kind!r}")
            if not is_set and self.kind == kind:
                raise ValueError(f"{knob} is missing; kind {kind!r} needs it")
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError("interval should be the lowest time, then the highest")
        if self.power is not None and self.power <= 0:
            raise ValueError(f"power is {self.power:g}; it should be more than 0")

    @property
    def measures_clips(self) -> bool:
        """Whether guidance measures something over a whole clip."""
        projects = self.apg is not None and (self.apg.parallel < 1 or self.apg.norm > 0)
        return self.rescale > 0 or projects

    @property
    def needs_unconditional(self) -> bool:
        """Whether the model is also evaluated without its condition."""
        return self.scale != 1


class Strength(NamedTuple):
    """The numbers of guidance as arguments of a compiled sampler, which serves any of them.

    Attributes:
        scale: w.
        interval: lowest and highest time; read only by the kind "interval" and by mean velocities.
    """

    scale: Float[Array, ""]
    interval: Float[Array, " 2"]

    @classmethod
    def of(cls, config: GuidanceConfig) -> "Strength":
        """Those of a config."""
        return cls(np.asarray(config.scale), np.asarray(config.interval or (0.0, 1.0)))


def scale_at(config: GuidanceConfig, time: Float[Array, "*n"], strength: Strength | None = None) -> Float[Array, "*n"]:
    """w at these times (0..1); with a `strength`, of its numbers instead of the config's."""
    scale, (start, end) = (config.scale, config.interval or (0.0, 1.0)) if strength is None else strength
    match config.kind:
        case "constant":
            return jnp.full_like(time, scale)
        case "interval":
            return jnp.where((start <= time) & (time <= end), scale, 1.0)
        case "power_cosine":
            return 1 + (scale - 1) * (1 - jnp.cos(math.pi * (1 - time) ** config.power)) / 2
    raise ValueError(f"{config.kind!r} is no kind of guidance")


def difference_of(
    config: GuidanceConfig,
    conditional: Float[Array, "b *n"],
    unconditional: Float[Array, "b *n"],
    before: Float[Array, "b *n"],
) -> Float[Array, "b *n"]:
    """Δ = x_c − x_u with APG's momentum; `before` is that of the evaluation before, zeros at the first."""
    difference = conditional - unconditional
    return difference if config.apg is None else difference + config.apg.momentum * before


def guide(
    config: GuidanceConfig,
    time: Float[Array, "..."],
    conditional: Float[Array, "b *n"],
    unconditional: Float[Array, "b *n"],
    before: Float[Array, "b *n"] | None = None,
    strength: Strength | None = None,
) -> Float[Array, "b *n"]:
    """The guided clean estimate, x = x_c + (w − 1) Δ with Δ = x_c − x_u, projected and rescaled.

    Rescaling brings the standard deviation over all of a clip, which guidance raises, φ of the way back to that of the
    conditional estimate. Lin et al. do it to the network's output v; here it is done to x, so that it means the same
    whatever the network predicts, and so that ε keeps following from z. At t = 1, where v = −x, the two agree.

    Args:
        config: see `GuidanceConfig`.
        time: 0..1, a scalar or broadcastable to the estimates.
        conditional: the estimate of the clean latents with the condition; the first axis counts clips.
        unconditional: the one without, at the same noisy latents.
        before: `difference_of` at the evaluation before; None is zeros.
        strength: see `scale_at`.
    """
    step = difference_of(config, conditional, unconditional, 0.0 if before is None else before)
    if config.apg is not None:
        step = projected(config.apg, step, conditional)
    # Written so that w = 1 gives the conditional estimate exactly.
    guided = conditional + (scale_at(config, time, strength) - 1) * step
    if config.rescale == 0:
        return guided
    each = tuple(range(1, guided.ndim))
    ratio = conditional.std(axis=each, keepdims=True) / jnp.maximum(guided.std(axis=each, keepdims=True), SMALLEST)
    return guided * (1 + config.rescale * (ratio - 1))


def projected(
    config: APGConfig, difference: Float[Array, "b *n"], conditional: Float[Array, "b *n"]
) -> Float[Array, "b *n"]:
    """Δ shrunk to the norm r, of which the part parallel to x_c is multiplied by η (Sadat et al. 2024, section 4)."""
    each = tuple(range(1, difference.ndim))

    def dot(a, b):
        return (a * b).sum(axis=each, keepdims=True)

    if config.norm > 0:
        norm = jnp.sqrt(dot(difference, difference))
        difference = difference * jnp.minimum(1, config.norm / jnp.maximum(norm, SMALLEST))
    if config.parallel == 1:
        return difference
    share = dot(difference, conditional) / jnp.maximum(dot(conditional, conditional), SMALLEST)
    return difference - (1 - config.parallel) * share * conditional
