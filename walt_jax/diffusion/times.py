"""The distribution of training times, and the shift of noise by the number of tokens."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

from walt_jax.config import Range

SMALLEST = 1e-6  # distance of times from 0 and 1, where some parameterisations determine nothing


@dataclass(frozen=True)
class TimesConfig:
    """The distribution of training times.

    Attributes:
        name: "uniform", or "logit_normal" (SD3, Esser et al. 2024, equation 19), which prefers the middle.
        mean: of logit t, only of "logit_normal": above 0 there is more noise, below 0 less.
        std: of logit t, only of "logit_normal".
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: Annotated[float, Range(-math.inf)] = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.name == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("mean and std are read only by 'logit_normal'; leave them out for 'uniform'")
        if self.std <= 0:
            raise ValueError(f"std is {self.std:g}; it should be more than 0")


def sample_times(config: TimesConfig, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Times in 0..1, both ends left out, one for each entry of `shape`.

    They are stratified over all entries, one in each of as many parts of equal probability, which gives the same
    expectation with less variance (Kingma et al. 2021). Each single entry follows the distribution.
    """
    count = math.prod(shape)
    quantile = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    if config.name == "uniform":
        time = quantile
    else:
        time = jax.nn.sigmoid(config.mean + config.std * jax.scipy.special.ndtri(quantile))
    return jnp.clip(time, SMALLEST, 1 - SMALLEST).reshape(shape)


def resolution_shift(tokens: Num[Array, "*n"], base_tokens: int) -> Float[Array, "*n"]:
    """The schedule's shift for clips of so many tokens: √(tokens / base_tokens) (SD3, equation 23).

    An unused clip slot has no tokens and counts as one, so that its shift stays positive.
    """
    return jnp.sqrt(jnp.maximum(tokens, 1) / base_tokens)
