"""What a stage trains. A task knows parameters and gradients; the loop knows the rest."""

import dataclasses
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from walt_jax.diffusion.objective import velocity_loss
from walt_jax.diffusion.schedule import schedule
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.text_to_video import TextToVideo

Metrics = dict[str, Float[Array, ""]]


class Task(Protocol):
    """What the loop needs."""

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        """Parameters with their logical axis names, `nn.Partitioned`, and what moves without a gradient."""

    def gradients(
        self, params: Any, moving: Any, frozen: Any, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[Any, Any, Metrics]:
        """Gradients like `params`, what moves as it is after the step, and scalars to log, "loss" among them.

        `frozen` is what the stages before have trained.
        """

    def served(self, params: Any, moving: Any) -> Any:
        """The part of both that the trained model needs."""

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        """Fresh parameters with an earlier stage's `served` put into them."""


@dataclasses.dataclass(frozen=True)
class DenoiserTask:
    """W.A.L.T on the frozen tokenizer's latents: encoded here, or cached ones from the batch."""

    model: TextToVideo
    self_conditioning: float

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        return self.model.init(key), {}

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: TrainedTokenizer,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
    ) -> tuple[Any, Any, Metrics]:
        latents = batch["latents"] if "latents" in batch else self.model.codec.encode(frozen, batch["video"])[0]

        def loss(params):
            denoise = self.model.denoise(params, batch["text"])
            return velocity_loss(denoise, latents, key, schedule(self.model.schedule), self.self_conditioning).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return gradients, moving, {"loss": value}

    def served(self, params: Any, moving: Any) -> Any:
        return params

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        return served, moving
