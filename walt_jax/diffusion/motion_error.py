"""Errors of motion: of how latents change from frame to frame, which errors of frames do not single out."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.config import Range

Weight = Annotated[float, Range(0)]


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Weights of two more terms of a stage's loss; 0 is none.

    They are errors of differences rather than differences themselves: what a model predicts in the mean is the same,
    and fast motion is not held back.

    Attributes:
        consistency: of the squared error of the difference of successive latent frames.
        smoothness: of that of the difference of these differences.
    """

    consistency: Weight = 0.0
    smoothness: Weight = 0.0


NO_MOTION = MotionConfig()


def motion_error(error: Float[Array, "b t h w c"], config: MotionConfig) -> Float[Array, ""]:
    """The weighted sum of squared differences of errors along time.

    Divided by what the differences of independent errors have in the mean, 2 and 6 times the squared error, so that a
    weight of 1 counts about as much as the loss itself. Images have none.
    """
    once = jnp.diff(error, axis=1)
    twice = jnp.diff(once, axis=1)
    return config.consistency * jnp.square(once).sum() / 2 + config.smoothness * jnp.square(twice).sum() / 6
