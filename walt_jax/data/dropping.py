"""Token dropping: training on a random subset of each clip's tokens (NaViT, Dehghani et al. 2023).

With fewer tokens per clip, more clips fit into a pack.
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int

from walt_jax.config import Range

CONCENTRATION = 4.0  # a + b of Beta(a, b)
SPREAD = 0.05  # standard deviation of a clip's rate around the mean of its resolution

Share = Annotated[float, Range(0, 0.99)]


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """The share of a clip's tokens that is dropped.

    Attributes:
        kind: "constant": always `rate`; "beta": drawn per clip from a Beta distribution with mean `rate`; "resolution":
            linear in the number of tokens, `rate - slope` for a clip of none to `rate + slope` for the largest one.
        rate: mean share, in [0, 1).
        slope: for "resolution".
    """

    kind: Literal["constant", "beta", "resolution"] = "constant"
    rate: Share = 0.0
    slope: Share = 0.0

    def __post_init__(self):
        if self.kind == "resolution" and not (self.slope <= self.rate and self.rate + self.slope < 1):
            raise ValueError(f"rate={self.rate:g} ± slope={self.slope:g} should lie between 0 and 1")
        if self.kind != "resolution" and self.slope:
            raise ValueError("slope is for kind='resolution'")


def drop_rate(config: DropConfig, tokens: int, most: int, rng: np.random.Generator) -> float:
    """The share of a clip's tokens that is dropped, in [0, 1].

    Args:
        config: see `DropConfig`.
        tokens: number of tokens of the clip.
        most: number of tokens of the largest clip.
        rng: the clip's generator.
    """
    if config.kind == "beta" and config.rate > 0:
        return rng.beta(CONCENTRATION * config.rate, CONCENTRATION * (1 - config.rate))
    if config.kind == "resolution":
        rate = config.rate + config.slope * (2 * tokens / most - 1)
        return float(np.clip(rate + SPREAD * rng.standard_normal(), 0, 1))
    return config.rate


def kept_tokens(tokens: int, rate: float, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Sorted indices of the tokens that are kept, at least one."""
    count = max(1, round(tokens * (1 - rate)))
    return np.sort(rng.choice(tokens, count, replace=False))
