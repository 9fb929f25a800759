"""What a stage trains: the tokenizer or the denoiser. A task knows its parameters and its loss; the loop knows the rest."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from walt_jax.diffusion.objective import velocity_loss
from walt_jax.diffusion.schedule import schedule
from walt_jax.models import DiffusionConfig, Models
from walt_jax.text.vocabulary import PAD


class Task(Protocol):
    """What `loop` needs of a task."""

    def init(self, key: PRNGKeyArray) -> Any:
        """Parameters with their logical axis names, `nn.Partitioned`."""

    def loss(self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        """A `state.LossFunction`."""
