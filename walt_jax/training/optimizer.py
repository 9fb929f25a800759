"""Optimizers by name, with warm-up and cosine decay. Where and how precisely their state is kept is in `moments`."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from walt_jax.config import Fraction
from walt_jax.training.moments import in_bfloat16, on_host
from walt_jax.training.muon import scale_by_muon

# Kernels whose axes have one of these names are embeddings or read-outs; Muon leaves them to Adam (Jordan et al. 2024).
NOT_HIDDEN = {"vocab", "latent", "position", "relative", "rank"}
SMALLEST_SIDE = 16  # of a matrix that is worth orthogonalising


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How a stage's parameters are updated.

    Attributes:
        name: "adamw"; "adafactor" (Shazeer and Stern 2018), see `adafactor`, W.A.L.T's for text to video; or "muon" for
            the hidden layers' matrices and convolutions with Adam for everything else.
        learning_rate: Adam's or Adafactor's peak.
        muon_learning_rate: Muon's peak.
        warmup_steps: linear, from 0.
        final_fraction: of the peak, where the cosine ends with the stage.
        b1, b2: Adam's decays of its moments.
        weight_decay: decoupled, times the learning rate.
        clip_norm: of the global gradient, for "adamw"; the others' updates have a norm of their own.
        clip_after: steps of the stage before gradients are clipped; 100,000 in Latte.
        state_dtype: of what the optimizer keeps between steps; "bfloat16" halves it, rounded stochastically.
        offload: whether what it keeps is in the host's memory between steps, see `moments.on_host`.
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
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False


def muon_kinds(boxed: Any) -> Any:
    """For each parameter "matrix" or "stack", of matrices, or "adam" where Adam updates it.

    A convolution's kernel is the matrix from its taps and channels in to its channels out; a scan's stacked kernels are
    a matrix each.

    Args:
        boxed: parameters with their logical axis names, `nn.Partitioned`.
    """

    def kind(parameter: nn.Partitioned) -> str:
        names, shape = parameter.names, parameter.value.shape
        first = 1 if names[0] == "layers" else 0
        if len(shape) - first < 2 or NOT_HIDDEN.intersection(names) or min(shape[-2:]) < SMALLEST_SIDE:
            return "adam"
        return "stack" if first else "matrix"

    return jax.tree.map(kind, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def clip_each_layer(threshold: float, boxed: Any) -> optax.GradientTransformation:
    """Scales down updates of arrays whose root mean square is above the threshold; layers of a scan count one by one.

    Args:
        threshold: Adafactor's d.
        boxed: parameters with their logical axis names, `nn.Partitioned`.
    """
    is_boxed = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    layers = jax.tree.map(lambda x: int(is_boxed(x) and x.names[0] == "layers"), boxed, is_leaf=is_boxed)

    def clip(update: jax.Array, first: int) -> jax.Array:
        mean = jnp.square(update).mean(tuple(range(first, update.ndim)), keepdims=True)
        return update / jnp.maximum(1.0, jnp.sqrt(mean) / threshold)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, layers))


def adafactor(learning_rate: optax.Schedule, weight_decay: float, boxed: Any) -> optax.GradientTransformation:
    """Adafactor with β₂ = 1 - step^-0.8, updates clipped at a root mean square of 1, no first moment.

    Of a matrix with both sides of 128 or more it keeps the mean square of each row and each column, of all else that of
    each value. The learning rate is not relative to the parameters' size: the papers' are Adam's. W.A.L.T states only
    the optimizer's name and the learning rate; all else is the default of Shazeer and Stern. Weight decay is decoupled
    and times the learning rate, as AdamW's; `optax.adafactor`'s would not be.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        clip_each_layer(1.0, boxed),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def make_optimizer(config: OptimizerConfig, steps: int, boxed: Any) -> optax.GradientTransformation:
    """The optimizer for a stage of `steps` steps over parameters like `boxed`."""
    optimizer = _named(config, steps, boxed)
    if config.state_dtype == "bfloat16":
        optimizer = in_bfloat16(optimizer)
    return on_host(optimizer) if config.offload else optimizer


def learning_rates(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """The learning rates of a stage of `steps` steps, by the number of steps done: `learning_rate`, and with Muon that
    of its matrices, `muon_learning_rate`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1), peak * config.final_fraction)

    rates = {"learning_rate": schedule(config.learning_rate)}
    return rates | ({"muon_learning_rate": schedule(config.muon_learning_rate)} if config.name == "muon" else {})


def _named(config: OptimizerConfig, steps: int, boxed: Any) -> optax.GradientTransformation:
    rates = learning_rates(config, steps)
    rate = rates["learning_rate"]
    if config.name == "muon":
        rest = (
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rates["muon_learning_rate"]),
        )
        # Adam beside Muon looks ahead, as Nesterov's momentum does (Dozat 2016).
        adam = optax.nadamw(rate, config.b1, config.b2, weight_decay=config.weight_decay)
        kinds = {
            "matrix": optax.chain(scale_by_muon(), *rest),
            "stack": optax.chain(scale_by_muon(stacked=True), *rest),
            "adam": adam,
        }
        return optax.partition(kinds, muon_kinds(boxed))
    if config.name == "adafactor":
        return adafactor(rate, config.weight_decay, boxed)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip_after:
        clip = optax.conditionally_transform(clip, lambda step: step >= config.clip_after)
    return optax.chain(
        clip,
        optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay),
    )
