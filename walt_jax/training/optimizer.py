"""Optimizers by name, with warm-up and cosine decay."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from walt_jax.config import Fraction

# Kernels whose axes have one of these names are embeddings or read-outs; Muon leaves them to Adam (Jordan et al. 2024).
NOT_HIDDEN = {"vocab", "latent", "position", "relative", "rank"}
SMALLEST_SIDE = 16  # of a matrix that is worth orthogonalising


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How a stage's parameters are updated.

    Attributes:
        name: "adamw"; "adafactor" (Shazeer and Stern 2018), whose second moments take the memory of a row and a column
            of each matrix; or "muon" for the hidden layers' matrices and convolutions with Adam for everything else.
        learning_rate: Adam's or Adafactor's peak.
        muon_learning_rate: Muon's peak.
        warmup_steps: linear, from 0.
        final_fraction: of the peak, where the cosine ends with the stage.
        b1, b2: Adam's decays of its moments.
        weight_decay: decoupled.
        clip_norm: of the global gradient, for "adamw"; the others' updates have a norm of their own.
        clip_after: steps of the stage before gradients are clipped; 100,000 in Latte.
    """

    name: Literal["adamw", "adafactor", "muon"]
    learning_rate: float
    muon_learning_rate: float = 0.02
    warmup_steps: int = 0
    final_fraction: Fraction = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    clip_after: int = 0


def muon_dimensions(boxed: Any) -> Any:
    """For each parameter the axes of its matrix, or None where Adam updates it.

    A convolution's kernel is the matrix from its taps and channels in to its channels out; a scan's stacked kernels are
    a matrix each.

    Args:
        boxed: parameters with their logical axis names, `nn.Partitioned`.
    """

    def dimensions(parameter: nn.Partitioned) -> MuonDimensionNumbers | None:
        names, shape = parameter.names, parameter.value.shape
        first = 1 if names[0] == "layers" else 0
        if len(shape) - first < 2 or NOT_HIDDEN.intersection(names) or min(shape[-2:]) < SMALLEST_SIDE:
            return None
        return MuonDimensionNumbers(tuple(range(first, len(shape) - 1)), (len(shape) - 1,))

    return jax.tree.map(dimensions, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def make_optimizer(config: OptimizerConfig, steps: int, boxed: Any) -> optax.GradientTransformation:
    """The optimizer for a stage of `steps` steps over parameters like `boxed`."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = min(config.warmup_steps, max(steps - 1, 0))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1), peak * config.final_fraction)

    if config.name == "muon":
        return muon(
            schedule(config.muon_learning_rate),
            weight_decay=config.weight_decay,
            adam_weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=schedule(config.learning_rate),
            muon_weight_dimension_numbers=muon_dimensions(boxed),
        )
    if config.name == "adafactor":
        return optax.adafactor(
            schedule(config.learning_rate),
            multiply_by_parameter_scale=False,  # the papers' learning rates are Adam's
            weight_decay_rate=config.weight_decay or None,
        )
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip_after:
        clip = optax.conditionally_transform(clip, lambda step: step >= config.clip_after)
    return optax.chain(
        clip,
        optax.adamw(schedule(config.learning_rate), config.b1, config.b2, weight_decay=config.weight_decay),
    )
