"""Micro-batches give the whole batch's gradients, with the same noise, times and masks; the discriminator's too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from walt_jax.denoiser.layout import PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, unboxed
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.discriminator import DiscriminatorConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.quantizers import HeadConfig
from walt_jax.training.accumulation import accumulated_gradients, micro_batches
from walt_jax.training.state import TrainState, make_train_step
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask
from walt_jax.training.tokenizer_task import TokenizerTask

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, COUNT = 6, 3
CODEC = Codec(Tokenizer(TokenizerConfig(2, 4, (1,), (), 1, 4, patch_size=2, taps=1)))


def filled(boxed):
    """All parameters random: what is zero at initialisation would hide mistakes."""
    leaves, tree = jax.tree.flatten(nn.meta.unbox(boxed))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def both(task, frozen, batch):
    """Results of micro-batches, and of the whole batch."""
    params, moving = map(filled, jax.eval_shape(task.init, jax.random.key(0)))

    @jax.jit
    def run(params, moving, batch):
        arguments = params, moving, frozen, batch, jax.random.key(7), jnp.int32(3)
        return accumulated_gradients(task, COUNT, *arguments), task.gradients(*arguments)

    return jax.device_get(run(params, moving, batch))


def assert_equal(found, expected):
    """Each array to a hundred-thousandth of its largest value."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, mine), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(other).max(), 1e-8)
        np.testing.assert_allclose(mine / scale, other / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("encoded", [True, False], ids=["latents", "video"])
def test_a_denoiser_whose_clips_have_different_numbers_of_values_in_the_loss(encoded):
    config = WaltConfig(
        dim=8, heads=1, layers=1, windows=((1, None, None),), relative="none", cross_attention=False, classes=3,
        frame_prediction=True,
    )  # fmt: skip
    shape = (3, 2, 2, 2)
    diffusion = DiffusionConfig(Schedule("cosine"), self_conditioning=0.5, min_snr=5.0, multiscale=1, adaptive=0.5)
    model = LatentDiffusion(CODEC, None, Denoiser(config, shape[:3]), diffusion, shape)
    task = DenoiserTask(model, ConditioningConfig((1, 2), 0.5, ("start", "rectangles")))
    rng, batch = np.random.default_rng(1), {"text": np.arange(BATCH, dtype=np.int32)[:, None] % 3}
    frozen = None
    if encoded:
        batch["latents"] = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    else:
        batch["video"] = rng.integers(0, 255, (BATCH, 3, 4, 4, 3), dtype=np.uint8)
        variables = CODEC.tokenizer.init(jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3)))
        frozen = TrainedTokenizer.unnormalised(unboxed(variables), 2)
    found, expected = both(task, frozen, batch)
    assert_equal(found, expected)
    counts = expected[2]["loss_by_noise"].count
    assert 0 < counts.sum() < BATCH * np.prod(shape)  # some are observed


def test_packs_whose_shards_are_dealt_to_micro_batches():
    """Six shards of a pack each, with different numbers of tokens."""
    config = WaltConfig(
        dim=8, heads=1, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary",
        cross_attention=False, classes=3, self_conditioning=False,
    )  # fmt: skip
    video, image, tokens = (3, 2, 2), (1, 2, 2), 16
    places = place_clips([[video], [image, image], [image], [video, image], [image], [video]], tokens, 2)
    windows = config.attention_windows
    rows = PackRows({window.name: ((4, 6, 1),) for window in windows}, (4, 6))
    rng = np.random.default_rng(1)
    batch = {
        "tokens": rng.normal(size=(BATCH, tokens, 2)).astype(np.float32),
        "text": (np.arange(2 * BATCH, dtype=np.int32) % 3).reshape(BATCH, 2, 1),
        "pack": make_pack(*places, windows, rows, shards=BATCH),
    }
    model = LatentDiffusion(CODEC, None, Denoiser(config, video), DiffusionConfig(Schedule("cosine")), (*video, 2))
    found, expected = both(DenoiserTask(model, ConditioningConfig()), None, batch)
    for results in found, expected:  # no means over counted values
        for name in ("tokens_valid_fraction", "clips_deferred"):
            results[2].pop(name)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("head", "losses"),
    [
        (HeadConfig("kl"), {"kl": 0.1, "log_error": True}),
        (HeadConfig("fsq", levels=(5, 3)), {"adversarial": 0.5, "r1": 2.0, "lecam": 0.0}),
    ],
    ids=["kl", "discriminator"],
)
def test_a_tokenizer(head, losses):
    if "adversarial" in losses:
        losses = {**losses, "discriminator": DiscriminatorConfig(2, (1,))}
    task = TokenizerTask(Tokenizer(TokenizerConfig(2, 2, (1,), (), 1, 1, taps=1, head=head)), LossConfig(**losses))
    video = np.random.default_rng(2).integers(0, 255, (BATCH, 1, 4, 4, 3), dtype=np.uint8)
    found, expected = both(task, None, {"video": video})
    for metrics in found[2], expected[2]:  # no means over clips
        for name in ("psnr_db", "code_usage", "code_perplexity"):
            metrics.pop(name, None)
    assert_equal(found, expected)


def test_rows_are_dealt_so_that_each_device_keeps_its_own():
    """Two devices with two shards each, of three rows."""
    rows = np.arange(12)
    np.testing.assert_array_equal(micro_batches(rows, 4, 2), [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
    np.testing.assert_array_equal(micro_batches(rows, 12, 3)[0], [0, 3, 6, 9])
    np.testing.assert_array_equal(micro_batches(np.arange(4), 4, 2), [[0, 2], [1, 3]])  # a row a shard


class Line:
    """(w · x + noise − y)² over the rows of a batch."""

    moves = True

    def draw(self, batch, key):
        return jax.random.normal(key, batch["y"].shape)

    def weight(self, batch, draws):
        return jnp.float32(len(draws))

    def gradients(self, params, moving, frozen, batch, key, step, draws=None):
        noise = self.draw(batch, key) if draws is None else draws

        def loss(params):
            return jnp.square(batch["x"] @ params["w"] + noise - batch["y"]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return gradients, moving, {"loss": value}

    def served(self, params, moving):
        return params


def test_a_step_accumulates_as_it_is_asked_to(monkeypatch):
    rng, counts = np.random.default_rng(0), []
    batch = {"x": rng.normal(size=(12, 3)).astype(np.float32), "y": rng.normal(size=12).astype(np.float32)}
    task, optimizer = Line(), optax.adam(0.1)
    original = Line.weight

    def weight(self, batch, draws):
        counts.append(len(draws))
        return original(self, batch, draws)

    monkeypatch.setattr(Line, "weight", weight)
    results = []
    for accumulate in (1, 4):
        state = TrainState.create({"w": jnp.ones(3)}, {}, task, optimizer, 0.0)
        step = make_train_step(task, optimizer, 0.0, accumulate=accumulate)
        for _ in range(3):
            state, metrics = step(state, None, batch, jax.random.key(0))
        results.append((state.params, metrics))
    assert set(counts) == {3}
    assert_equal(*results)
