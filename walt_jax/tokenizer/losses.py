"""MAGVIT-v2's losses: pure functions of pixels, logits and steps, and the weights that add them up."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from walt_jax.config import Positive
from walt_jax.tokenizer.discriminator import DiscriminatorConfig

Averages = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the tokenizer's losses; MAGVIT-v2's are in `configs/magvit2_video.py`.

    Attributes:
        reconstruction: of the mean squared error.
        log_error: whether `reconstruction` weighs the mean over clips of log(squared error) instead (Rybkin et al.
            2021, a Gaussian likelihood of the best variance): mean PSNR, to which each clip contributes alike.
        commitment: of the distance between encodings and their codes (heads "lfq" and "vq").
        entropy: of LFQ's entropy penalty, at the end.
        entropy_start: times that weight at the first step; it falls linearly
        entropy_steps: over so many steps.
        kl: of the divergence from N(0, 1) (head "kl").
        adversarial: of the non-saturating loss against the discriminator; 0 builds none.
        r1: of the gradient penalty on real clips, 10 · E‖∇D‖² in the paper (without a half).
        lecam: of LeCam's regularisation.
        perceptual: of the distance between features of original and reconstruction, see `perceptual`; off unless
            `perceptual_weights` is set.
        perceptual_weights: a safetensors file with that network's weights.
        discriminator: its shape, where `adversarial` is above 0.
    """

    reconstruction: float = 1.0
    log_error: bool = False
    commitment: float = 0.25
    entropy: float = 0.1
    entropy_start: float = 3.0
    entropy_steps: Positive = 2000
    kl: float = 1e-6
    adversarial: float = 0.0
    r1: float = 10.0
    lecam: float = 0.001
    perceptual: float = 0.0
    perceptual_weights: str = ""
    discriminator: DiscriminatorConfig | None = None

    def __post_init__(self):
        if (self.adversarial > 0) != (self.discriminator is not None):
            raise ValueError("adversarial above 0 and discriminator go together: give both or neither")
        if (self.perceptual > 0) != bool(self.perceptual_weights):
            raise ValueError(
                "perceptual above 0 and perceptual_weights (a safetensors file, see walt_jax/tokenizer/perceptual.py) "
                "go together: give both or neither"
            )


def entropy_weight(config: LossConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """From `entropy_start` times the weight down to the weight itself."""
    done = jnp.clip(step / config.entropy_steps, 0, 1)
    return config.entropy * (config.entropy_start + (1 - config.entropy_start) * done)


def generator_loss(fake: Float[Array, " b"]) -> Float[Array, ""]:
    """Non-saturating: -log σ(D(fake))."""
    return jax.nn.softplus(-fake).mean()


def discriminator_loss(real: Float[Array, " b"], fake: Float[Array, " b"]) -> Float[Array, ""]:
    """-log σ(D(real)) - log(1 - σ(D(fake)))."""
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


LECAM_DECAY = 0.999


def lecam_averages() -> Averages:
    return {"real": jnp.zeros(()), "fake": jnp.zeros(())}


def lecam_loss(real: Float[Array, " b"], fake: Float[Array, " b"], averages: Averages) -> Float[Array, ""]:
    """Keeps logits near the moving average of the other side's (Tseng et al. 2021): for little data."""
    return jnp.square(jax.nn.relu(real.mean() - averages["fake"])) + jnp.square(
        jax.nn.relu(averages["real"] - fake.mean())
    )


def lecam_update(real: Float[Array, " b"], fake: Float[Array, " b"], averages: Averages) -> Averages:
    means = {"real": real.mean(), "fake": fake.mean()}
    return {name: LECAM_DECAY * averages[name] + (1 - LECAM_DECAY) * mean for name, mean in means.items()}
