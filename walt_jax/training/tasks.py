"""What a stage trains: the tokenizer or the denoiser. A task knows parameters and loss; the loop knows the rest."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from walt_jax.diffusion.objective import velocity_loss
from walt_jax.diffusion.schedule import schedule
from walt_jax.generation.text_to_video import TextToVideo, TrainedTokenizer, to_float
from walt_jax.tokenizer.autoencoder import Tokenizer

Metrics = dict[str, Float[Array, ""]]


class Task(Protocol):
    """What the loop needs."""

    def init(self, key: PRNGKeyArray) -> Any:
        """Parameters with their logical axis names, `nn.Partitioned`."""

    def loss(self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        """A `state.LossFunction`; `frozen` is what the stages before have trained."""


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Reconstruction of clips, or of images as clips of one frame."""

    tokenizer: Tokenizer

    def init(self, key: PRNGKeyArray) -> Any:
        strides = self.tokenizer.config.strides
        return self.tokenizer.init(key, jnp.zeros((1, 1, strides[1], strides[2], 3)))["params"]

    def loss(self, params: Any, frozen: None, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        video = to_float(batch["video"])
        reconstruction, _ = self.tokenizer.apply({"params": params}, video)
        error = jnp.square(reconstruction - video).mean()
        return error, {"psnr_db": psnr_db(error)}


def psnr_db(error: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Peak signal-to-noise ratio of a mean squared error of values in -1..1, whose peak is 2."""
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


@dataclasses.dataclass(frozen=True)
class DenoiserTask:
    """W.A.L.T on the frozen tokenizer's latents: encoded here, or cached ones from the batch."""

    model: TextToVideo
    self_conditioning: float

    def init(self, key: PRNGKeyArray) -> Any:
        return self.model.init(key)

    def loss(
        self, params: Any, frozen: TrainedTokenizer, batch: Any, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Metrics]:
        latents = batch["latents"] if "latents" in batch else self.model.encode(frozen, batch["video"])
        latents = jax.lax.stop_gradient(latents)
        denoise = self.model.denoise(params, batch["text"])
        losses = velocity_loss(denoise, latents, key, schedule(self.model.schedule), self.self_conditioning)
        return losses.mean(), {}
