"""Token dropping: a clip is trained on with some of its tokens, at a rate of its own (NaViT, Dehghani et al. 2023).

Fewer tokens a clip are more clips a pack.
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int

from walt_jax.config import Range

# Of Beta(a, b), whose mean is a / (a + b).
CONCENTRATION = 4.0
# A clip's rate is drawn around what its resolution gives, with this deviation.
SPREAD = 0.05

Share = Annotated[float, Range(0, 0.99)]


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """How many of a clip's tokens are left out.

    Attributes:
        kind: "constant": `rate` of all; "beta": a rate from a Beta distribution with mean `rate`, between 0 and 1;
            "resolution": from `rate - slope` for the smallest clip to `rate + slope` for the largest.
        rate: on average.
        slope: read by "resolution".
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
    """The share of a clip's tokens that is left out, in 0..1.

    Args:
        config: see `DropConfig`.
        tokens: of the clip.
        most: of the largest clip.
        rng: of the clip.
    """
    if config.kind == "beta" and config.rate > 0:
        return rng.beta(CONCENTRATION * config.rate, CONCENTRATION * (1 - config.rate))
    if config.kind == "resolution":
        rate = config.rate + config.slope * (2 * tokens / most - 1)
        return float(np.clip(rate + SPREAD * rng.standard_normal(), 0, 1))
    return config.rate


def kept_tokens(tokens: int, rate: float, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Which tokens of a clip are trained on, in their order: one at least."""
    count = max(1, round(tokens * (1 - rate)))
    return np.sort(rng.choice(tokens, count, replace=False))
