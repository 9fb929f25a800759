"""Training LoRA: A and B alone have gradients and an optimizer's state; the model that they change is frozen."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from walt_jax.generation import lora
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.lora import LoraConfig
from walt_jax.training.tasks import DenoiserTask, Drawn, Metrics


class Frozen(NamedTuple):
    """What a LoRA stage takes as it is.

    Attributes:
        tokenizer: None where no clip is encoded in the step.
        base: parameters of the model that is changed.
    """

    tokenizer: TrainedTokenizer | None
    base: Any


@dataclasses.dataclass(frozen=True)
class LoraTask:
    """A denoiser's task, of which A and B are trained.

    Attributes:
        whole: the task of all of its parameters, which gives the loss.
        lora: see `LoraConfig`.
    """

    whole: DenoiserTask
    lora: LoraConfig

    moves = False

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        shapes, moving = jax.eval_shape(self.whole.init, key)
        return lora.fresh(shapes, self.lora, key), moving

    def draw(self, batch: Any, key: PRNGKeyArray) -> Drawn:
        return self.whole.draw(batch, key)

    def tokens(self, batch: Any) -> int:
        return self.whole.tokens(batch)

    def weight(self, batch: Any, draws: Drawn) -> Float[Array, ""]:
        return self.whole.weight(batch, draws)

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: Frozen,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        draws: Drawn | None = None,
    ) -> tuple[Any, Any, Metrics]:
        """Gradients of the whole task's loss at W + α/r · B A with respect to A and B.

        By the chain rule from those with respect to the merged weights; the compiler leaves out those of all other
        parameters, which nothing reads.
        """
        merged, to_pairs = jax.vjp(lambda pairs: lora.merged(frozen.base, pairs, self.lora.scale), params)
        gradients, moving, metrics = self.whole.gradients(merged, moving, frozen.tokenizer, batch, key, step, draws)
        return *to_pairs(gradients), moving, metrics

    def served(self, params: Any, moving: Any) -> Any:
        """A and B; `lora.merged` makes the model of them and the base."""
        return params

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        return served, moving
