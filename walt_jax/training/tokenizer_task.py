"""The tokenizer's training: reconstruction, its head's penalties and, where there is one, the discriminator's game."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from walt_jax.generation.codec import to_float
from walt_jax.tokenizer import block_transform, losses
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.tokenizer.block_transform import SMALLEST_ERROR
from walt_jax.tokenizer.discriminator import Discriminator
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.perceptual import FeatureWeights, feature_distance
from walt_jax.tokenizer.quantizers import Head, code_statistics
from walt_jax.training.tasks import Metrics


def psnr_db(error: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Peak signal-to-noise ratio of a mean squared error of values in -1..1, whose peak is 2."""
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Reconstruction of clips, or of images as clips of one frame.

    Attributes:
        tokenizer: the model.
        config: the losses' weights.
        features: the perceptual loss's weights, where it is on.
    """

    tokenizer: Tokenizer
    config: LossConfig
    features: FeatureWeights | None = None

    moves = True

    @functools.cached_property
    def discriminator(self) -> Discriminator | None:
        if self.config.discriminator is None:
            return None
        shape = self.tokenizer.config
        return Discriminator(self.config.discriminator, shape.route, jnp.dtype(shape.dtype))

    def init(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        _, height, width = self.tokenizer.config.strides
        video = jnp.zeros((1, 1, height, width, 3))
        variables = self.tokenizer.init(key, video)
        params, moving = {"tokenizer": variables["params"]}, {}
        if "codebook" in variables:
            moving["codebook"] = variables["codebook"]
        if self.discriminator is not None:
            params["discriminator"] = self.discriminator.init(jax.random.fold_in(key, 1), video)["params"]
            moving["lecam"] = losses.lecam_averages()
        return params, moving

    def fit(self, params: Any, video: UInt8[np.ndarray, "b t h w 3"]) -> Any:
        """Fresh parameters whose block transform is that of these clips' principal components."""
        config = self.tokenizer.config
        head = Head(config.head, config.latent_channels)
        # "vq" has no codes yet, and "kl" decodes a draw: both are fitted as if their latents were decoded as they are.
        quantize = (lambda z: head.apply({}, z).latents) if config.head.name in ("lfq", "fsq") else None
        shape = config.latent_channels, config.strides, config.block_bits
        parts = block_transform.fit(to_float(video), *shape, quantize)
        tokenizer = dict(params["tokenizer"])
        for coder, fitted in zip(("encoder", "decoder"), parts, strict=True):
            tokenizer[coder] = {**tokenizer[coder], "blocks": {**tokenizer[coder]["blocks"], **fitted}}
        return {**params, "tokenizer": tokenizer}

    def served(self, params: Any, moving: Any) -> Any:
        codebook = {"codebook": moving["codebook"]} if "codebook" in moving else {}
        return {"params": params["tokenizer"], **codebook}

    def start(self, params: Any, moving: Any, served: Any) -> tuple[Any, Any]:
        """The discriminator starts anew: of the one before there is no average, and the frames may be others."""
        codebook = {"codebook": served["codebook"]} if "codebook" in served else {}
        return {**params, "tokenizer": served["params"]}, {**moving, **codebook}

    def draw(self, batch: Any, key: PRNGKeyArray) -> Float[Array, "b t h w c"] | None:
        """The head's noise."""
        shape = len(batch["video"]), *self.tokenizer.config.latent_shape(*batch["video"].shape[1:4])
        return self.tokenizer.apply({}, shape, method="noise", rngs={"latent": key})

    def tokens(self, batch: Any) -> int:
        """Latent positions."""
        count, *clip, _ = batch["video"].shape
        return count * math.prod(self.tokenizer.config.latent_shape(*clip)[:3])

    def weight(self, batch: Any, draws: Any) -> Float[Array, ""]:
        """How many clips there are: losses are means over them."""
        return jnp.float32(len(batch["video"]))

    def gradients(
        self,
        params: Any,
        moving: Any,
        frozen: None,
        batch: Any,
        key: PRNGKeyArray,
        step: Int[Array, ""],
        draws: Float[Array, "b t h w c"] | None = None,
    ) -> tuple[Any, Any, Metrics]:
        """One forward pass of the tokenizer, and one of the discriminator on what it made, serve both players."""
        video = to_float(batch["video"])
        noise = self.draw(batch, key) if draws is None else draws
        codebook = {name: moving[name] for name in ("codebook",) if name in moving}

        def reconstruct(tokenizer):
            variables = {"params": tokenizer, **codebook}
            (reconstruction, quantized), moved = self.tokenizer.apply(
                variables, video, train=True, noise=noise, rngs={"latent": key}, mutable=list(codebook)
            )
            weights = {
                "commitment": self.config.commitment,
                "entropy": losses.entropy_weight(self.config, step),
                "kl": self.config.kl,
            }
            penalty = sum((weights[name] * value for name, value in quantized.penalties.items()), start=jnp.zeros(()))
            return (reconstruction, penalty), (quantized, moved)

        def pixels(reconstruction):
            errors = jnp.square(reconstruction - video).mean(axis=(1, 2, 3, 4))
            error = errors.mean()
            loss = self.config.reconstruction * (
                jnp.log(errors + SMALLEST_ERROR).mean() if self.config.log_error else error
            )
            parts = {"psnr_db": psnr_db(error)}
            if self.features is not None:
                parts["perceptual"] = feature_distance(self.features, reconstruction, video).mean()
                loss = loss + self.config.perceptual * parts["perceptual"]
            return loss, parts

        (reconstruction, penalty), pull_back, (quantized, moved) = jax.vjp(
            reconstruct, params["tokenizer"], has_aux=True
        )
        (loss, metrics), to_pixels = jax.value_and_grad(pixels, has_aux=True)(reconstruction)
        gradients, after = {}, {**moving, **moved}
        if self.discriminator is not None:
            game = self._game(params["discriminator"], video, reconstruction, moving["lecam"])
            gradients["discriminator"], adversarial, to_fake, after["lecam"], more = game
            loss = loss + self.config.adversarial * adversarial
            to_pixels = to_pixels + self.config.adversarial * to_fake
            metrics |= more
        (gradients["tokenizer"],) = pull_back((to_pixels, jnp.ones(())))
        if quantized.indices is not None:
            config = self.tokenizer.config
            metrics |= code_statistics(quantized.indices, config.head.group_codes(config.latent_channels))
        return gradients, after, {"loss": loss + penalty, **metrics, **quantized.penalties}

    def _game(
        self,
        params: Any,
        video: Float[Array, "b t h w 3"],
        reconstruction: Float[Array, "b t h w 3"],
        averages: losses.Averages,
    ) -> tuple[Any, Float[Array, ""], Float[Array, "b t h w 3"], losses.Averages, Metrics]:
        """The discriminator's gradients; the generator's loss and its gradient to the pixels; LeCam's averages."""

        def judge(params, clips):
            return self.discriminator.apply({"params": params}, clips)

        fake, pull_fake = jax.vjp(judge, params, reconstruction)
        real, pull_real = jax.vjp(lambda params: judge(params, video), params)

        def game(real, fake):
            lecam = losses.lecam_loss(real, fake, averages)
            return losses.discriminator_loss(real, fake) + self.config.lecam * lecam

        def penalty(params):
            slope = jax.grad(lambda clips: judge(params, clips).sum())(video)
            return jnp.square(slope).sum(axis=(1, 2, 3, 4)).mean()

        loss, (to_real, to_fake) = jax.value_and_grad(game, argnums=(0, 1))(real, fake)
        gradients = [pull_real(to_real)[0], pull_fake(to_fake)[0]]
        metrics = {
            "discriminator_loss": loss,
            "discriminator_accuracy": ((real > 0).mean() + (fake < 0).mean()) / 2,
        }
        if self.config.r1 > 0:
            metrics["r1"], slopes = jax.value_and_grad(penalty)(params)
            gradients.append(jax.tree.map(lambda slope: self.config.r1 * slope, slopes))
        adversarial, to_fake = jax.value_and_grad(losses.generator_loss)(fake)
        metrics["adversarial"] = adversarial
        return (
            jax.tree.map(lambda *parts: sum(parts), *gradients),
            adversarial,
            pull_fake(to_fake)[1],
            losses.lecam_update(real, fake, averages),
            metrics,
        )
