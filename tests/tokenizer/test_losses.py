"""The losses are their formulas, and one pass for both players gives the gradients of each one's whole loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.layers import Linear
from walt_jax.tokenizer import losses
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.discriminator import DiscriminatorConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.perceptual import TRUNKS, feature_distance
from walt_jax.tokenizer.quantizers import Head, HeadConfig
from walt_jax.training.tokenizer_task import TokenizerTask, psnr_db

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


REAL, FAKE = 2 * normal(0, 5), 2 * normal(1, 5)
AVERAGES = {"real": jnp.float32(0.4), "fake": jnp.float32(-0.3)}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_the_game_is_non_saturating():
    np.testing.assert_allclose(losses.generator_loss(FAKE), -np.log(sigmoid(FAKE)).mean(), rtol=1e-5)
    expected = -np.log(sigmoid(REAL)).mean() - np.log(1 - sigmoid(FAKE)).mean()
    np.testing.assert_allclose(losses.discriminator_loss(REAL, FAKE), expected, rtol=1e-5)


def test_the_games_losses_are_finite_for_any_logits():
    sure = jnp.array([1e4, -1e4])
    assert losses.generator_loss(sure) == 5e3
    assert losses.discriminator_loss(sure, sure) == 1e4


@pytest.mark.parametrize("sign", [1, -1])
def test_lecam_is_the_squared_margin_of_mean_logits_over_the_other_sides_average(sign):
    real, fake = (sign * np.asarray(logits, np.float64) for logits in (REAL + 1, FAKE - 1))
    expected = max(real.mean() - -0.3, 0) ** 2 + max(0.4 - fake.mean(), 0) ** 2
    ours = losses.lecam_loss(sign * (REAL + 1), sign * (FAKE - 1), AVERAGES)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert (expected > 0) == (sign == 1)


def test_lecams_averages_by_hand():
    averages = losses.lecam_averages()
    assert averages == {"real": 0, "fake": 0}
    averages = losses.lecam_update(jnp.array([1.0, 3]), jnp.array([-10.0, 0]), averages)
    np.testing.assert_allclose(averages["real"], 0.001 * 2, rtol=1e-5)
    np.testing.assert_allclose(averages["fake"], 0.001 * -5, rtol=1e-5)
    averages = losses.lecam_update(jnp.array([4.0]), jnp.array([1.0]), averages)
    np.testing.assert_allclose(averages["real"], 0.999 * 0.002 + 0.001 * 4, rtol=1e-5)
    np.testing.assert_allclose(averages["fake"], 0.999 * -0.005 + 0.001, rtol=1e-5)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.6), (500, 0.4), (1000, 0.2), (1001, 0.2), (10**6, 0.2)])
def test_the_entropys_weight_falls_linearly_to_its_end(step, expected):
    config = LossConfig(entropy=0.2, entropy_start=3.0, entropy_steps=1000)
    np.testing.assert_allclose(losses.entropy_weight(config, jnp.int32(step)), expected, rtol=1e-6)


def test_signal_to_noise():
    error = jnp.array([4.0, 0.4, 0.04, 0])
    np.testing.assert_allclose(psnr_db(error), [0, 10, 20, 10 * np.log10(4e10)], rtol=1e-5, atol=1e-6)


# Without blocks: they would take most of the time to compile, and the losses know nothing of them.
DISCRIMINATOR = DiscriminatorConfig(2, ())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"adversarial": 0.1}, "adversarial above 0 and discriminator go together: give both or neither"),
        ({"discriminator": DISCRIMINATOR}, "adversarial above 0 and discriminator go together: give both or neither"),
        ({"perceptual": 0.1}, "perceptual above 0 and perceptual_weights (a safetensors file, see "),
        ({"perceptual_weights": "vgg.safetensors"}, "perceptual above 0 and perceptual_weights (a safetensors file"),
    ],
)
def test_weights_without_their_networks_are_refused_and_networks_without_their_weights(knobs, message):
    with pytest.raises(ValueError) as refusal:
        LossConfig(**knobs)
    assert str(refusal.value).startswith(message)
    assert str(refusal.value).endswith("give both or neither")
    assert "\n" not in str(refusal.value)


def test_networks_with_their_weights_are_taken():
    LossConfig()
    LossConfig(adversarial=0.1, discriminator=DISCRIMINATOR, perceptual=0.1, perceptual_weights="vgg.safetensors")


class Pointwise(nn.Module):
    """A tokenizer of single pixels with the heads of the real one: what is compiled for it is a tenth."""

    config: TokenizerConfig

    def setup(self):
        channels = self.config.latent_channels
        self.head = Head(self.config.head, channels)
        self.encoder = Linear(self.config.head.inputs(channels))
        self.decoder = Linear(3)

    def noise(self, shape):
        b, t, h, w, c = shape
        return self.head.noise((b, t, 2 * h, 2 * w, c))  # its latents are not downsampled

    def __call__(self, video, train=False, noise=None):
        quantized = self.head(self.encoder(video), train, noise)
        return self.decoder(nn.swish(quantized.latents)), quantized


def filled(task):
    """The task's parameters, all random, and what moves: what is zero at initialisation would hide mistakes."""
    params, moving = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    # Of a size that pixels and logits don't get out of hand with.
    scales = [(leaf.size / leaf.shape[-1] + 1) ** -0.5 for leaf in leaves]
    params = tree.unflatten(
        [scale * normal(i, *leaf.shape) for i, (leaf, scale) in enumerate(zip(leaves, scales, strict=True))]
    )
    moving = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), moving)
    if "codebook" in moving:
        codebook = moving["codebook"]["head"]["codebook"]
        codebook["counts"] = jnp.full_like(codebook["counts"], 3)
        codebook["sums"] = 3 * normal(100, *codebook["sums"].shape)
    if "lecam" in moving:
        moving["lecam"] = AVERAGES
    return params, moving


def separately(task, params, moving, video, key, step):
    """The twin: each player's whole loss in one function of its parameters, the other's held fixed."""
    config, after = task.config, dict(moving)

    def run(tokenizer):
        codebook = {"codebook": moving["codebook"]} if "codebook" in moving else {}
        variables = {"params": tokenizer, **codebook}
        return task.tokenizer.apply(variables, video, train=True, rngs={"latent": key}, mutable="codebook")

    def judge(discriminator, clips):
        return task.discriminator.apply({"params": discriminator}, clips)

    def generator(tokenizer):
        (reconstruction, quantized), moved = run(tokenizer)
        errors = jnp.stack([jnp.mean((mine - clip) ** 2) for mine, clip in zip(reconstruction, video, strict=True)])
        loss = config.reconstruction * jnp.mean(jnp.log(errors + 1e-4) if config.log_error else errors)
        done = min(step / config.entropy_steps, 1)
        penalties = {
            "entropy": config.entropy * (config.entropy_start * (1 - done) + done),
            "commitment": config.commitment,
            "kl": config.kl,
        }
        for name, value in quantized.penalties.items():
            loss += penalties[name] * value
        if config.perceptual:
            loss += config.perceptual * feature_distance(task.features, reconstruction, video).mean()
        if config.adversarial:
            fake = judge(jax.lax.stop_gradient(params["discriminator"]), reconstruction)
            loss += config.adversarial * jnp.mean(-jnp.log(jax.nn.sigmoid(fake)))
        return loss, moved

    def discriminator(discriminator):
        real = judge(discriminator, video)
        fake = judge(discriminator, jax.lax.stop_gradient(run(params["tokenizer"])[0][0]))
        loss = -jnp.mean(jnp.log(jax.nn.sigmoid(real))) - jnp.mean(jnp.log(1 - jax.nn.sigmoid(fake)))
        averages = moving["lecam"]
        loss += config.lecam * jax.nn.relu(real.mean() - averages["fake"]) ** 2
        loss += config.lecam * jax.nn.relu(averages["real"] - fake.mean()) ** 2
        slopes = jax.vmap(jax.grad(lambda clip: judge(discriminator, clip[None])[0]))(video)
        means = {"real": real.mean(), "fake": fake.mean()}
        after_it = {side: 0.999 * averages[side] + 0.001 * mean for side, mean in means.items()}
        return loss + config.r1 * jnp.sum(slopes**2) / len(slopes), after_it

    (value, moved), gradients = jax.value_and_grad(generator, has_aux=True)(params["tokenizer"])
    after |= moved
    players = {"tokenizer": gradients}
    if config.adversarial:
        players["discriminator"], after["lecam"] = jax.grad(discriminator, has_aux=True)(params["discriminator"])
    return players, after, value


def features(widths=(2, 3, 2, 3, 2)):
    weights, before = {}, 3
    for part, (layers, width) in enumerate(zip(TRUNKS["vgg"].slices, widths, strict=True)):
        for layer in layers:
            weights[f"kernel{layer}"] = normal(layer, 3, 3, before, width) / np.sqrt(4 * before)
            weights[f"bias{layer}"] = 0.3 * normal(layer + 100, width)
            before = width
        weights[f"lin{part}"] = jnp.abs(normal(part, width))
    return weights


WITH_DISCRIMINATOR = {"adversarial": 0.7, "lecam": 0.5, "r1": 2.0, "discriminator": DISCRIMINATOR}
PERCEPTUAL = {"perceptual": 0.8, "perceptual_weights": "vgg.safetensors"}


@pytest.mark.parametrize(
    ("kind", "head", "knobs", "size"),
    [
        (Pointwise, HeadConfig("lfq", groups=2), {"entropy_steps": 40, **WITH_DISCRIMINATOR}, (3, 4, 4)),
        (Pointwise, HeadConfig("kl"), {"kl": 0.3, "log_error": True, **PERCEPTUAL}, (1, 16, 16)),
        (Tokenizer, HeadConfig("vq", codes=3), {"reconstruction": 3.0}, (3, 4, 4)),
    ],
    ids=["lfq, discriminator", "kl, perceptual", "vq"],
)
def test_one_pass_for_both_players_gives_the_gradients_of_each_ones_loss(kind, head, knobs, size):
    model = kind(TokenizerConfig(4, 4, (1, 1), ((1, 2, 2),), 1, 2, taps=1, head=head, route="direct"))
    task = TokenizerTask(model, LossConfig(**knobs), features() if "perceptual" in knobs else None)
    params, moving = filled(task)
    pixels = np.random.default_rng(3).integers(0, 256, (2, *size, 3), np.uint8)
    key, step = jax.random.key(5), 10

    @jax.jit
    def both(params, moving):
        ours = task.gradients(params, moving, None, {"video": pixels}, key, jnp.int32(step))
        return ours, separately(task, params, moving, jnp.asarray(pixels / 127.5 - 1, jnp.float32), key, step)

    (gradients, after, metrics), (expected, expected_after, loss) = both(params, moving)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, mine), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        largest = np.abs(other).max()
        assert largest > 1e-7, path
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * largest, err_msg=str(path))
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-4), after, expected_after)
    for value in metrics.values():
        assert np.isfinite(value)
