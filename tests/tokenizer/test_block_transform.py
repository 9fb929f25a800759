"""The linear path next to the convolutions: principal components at the start, causal, and the same in chunks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.block_transform import (
    Analysis,
    Synthesis,
    best_gains,
    clip_weights,
    fit,
    fold,
    principal_components,
    unfold,
)
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.quantizers import HeadConfig
from walt_jax.training.tokenizer_task import TokenizerTask

STRIDES, CHANNELS = (2, 2, 4), 6
CONFIG = TokenizerConfig(CHANNELS, 4, (1, 2), ((2, 1, 2),), 1, 2, patch_size=2, block_transform=True)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def smooth(seed, frames=5, height=4, width=8):
    """Clips of slow waves in -1..1."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(*(np.arange(n) for n in (frames, height, width)), indexing="ij")
    speed, phase = rng.uniform(0, 0.3, (3, 3)), rng.uniform(0, 6, 3)
    waves = [np.sin(s[0] * t + s[1] * y + s[2] * x + p) for s, p in zip(speed, phase, strict=True)]
    return np.stack(waves, -1)[None].astype(np.float32)


def blocks_of(video, first):
    """Each block of the first frame, or of the later ones, as a row."""
    frames, height, width = video.shape[1:4]
    times = [(0, 1)] if first else [(t, t + STRIDES[0]) for t in range(1, frames, STRIDES[0])]
    corners = [(y, x) for y in range(0, height, STRIDES[1]) for x in range(0, width, STRIDES[2])]
    return np.stack(
        [
            clip[start:stop, y : y + STRIDES[1], x : x + STRIDES[2]].ravel()
            for clip in video.astype(np.float64)
            for start, stop in times
            for y, x in corners
        ]
    )


def projected(blocks, training, channels, weights):
    """The twin: unit-variance coordinates along the right singular vectors, and the blocks of these."""
    mean = np.average(training, 0, weights)
    scaled = (training - mean) * np.sqrt(weights / weights.sum())[:, None]
    _, singular, vectors = np.linalg.svd(scaled, full_matrices=False)
    vectors = vectors[:channels] * np.where(vectors[:channels].sum(1, keepdims=True) < 0, -1, 1)
    coordinates = (blocks - mean) @ vectors.T
    return coordinates / singular[:channels], mean + coordinates @ vectors


def weights_of(clips, channels):
    """`clip_weights`, one clip's as often as it has blocks: for first frames and for later ones."""
    parts = [blocks_of(clips, first) for first in (True, False)]
    weights = clip_weights([part.reshape(len(clips), -1, part.shape[1]) for part in parts], channels)
    return {
        first: np.repeat(weights, len(part) // len(clips)) for first, part in zip((True, False), parts, strict=True)
    }


@pytest.fixture(scope="module")
def clips():
    return np.concatenate(
        [smooth(seed) + 0.1 * np.random.default_rng(seed).normal(size=(1, 5, 4, 8, 3)) for seed in range(40)]
    )


@pytest.fixture(scope="module")
def fitted(clips):
    return fit(clips, CHANNELS, STRIDES)


def test_latents_are_the_principal_components_of_blocks(clips, fitted):
    unseen = smooth(99)
    latents = Analysis(CHANNELS, STRIDES).apply({"params": fitted[0]}, unseen, True)
    back = Synthesis(STRIDES).apply({"params": fitted[1]}, latents, True)
    weights = weights_of(clips, CHANNELS)
    for first, part in ((True, latents[:, :1]), (False, latents[:, 1:])):
        expected, blocks = projected(blocks_of(unseen, first), blocks_of(clips, first), CHANNELS, weights[first])
        np.testing.assert_allclose(part.reshape(-1, CHANNELS), expected, atol=1e-4)
        np.testing.assert_allclose(blocks_of(np.asarray(back), first), blocks, atol=1e-4)


def test_with_as_many_channels_as_values_nothing_is_lost():
    video = np.random.default_rng(0).uniform(-1, 1, (40, 5, 4, 8, 3)).astype(np.float32)
    channels = 3 * int(np.prod(STRIDES))
    analysis, synthesis = fit(video, channels, STRIDES)
    latents = Analysis(channels, STRIDES).apply({"params": analysis}, video[:1], True)
    np.testing.assert_allclose(Synthesis(STRIDES).apply({"params": synthesis}, latents, True), video[:1], atol=1e-3)


def test_clips_without_variance_and_clips_of_one_frame_are_fitted():
    black = np.full((2, 5, 4, 8, 3), -1.0, np.float32)
    analysis, synthesis = fit(black, CHANNELS, STRIDES)
    latents = Analysis(CHANNELS, STRIDES).apply({"params": analysis}, black, True)
    np.testing.assert_allclose(latents, np.zeros_like(latents), atol=1e-4)
    np.testing.assert_allclose(Synthesis(STRIDES).apply({"params": synthesis}, latents, True), black, atol=1e-5)
    assert set(fit(black[:, :1], CHANNELS, STRIDES)[0]) == {"first_kernel", "first_bias"}


def test_signs_of_folded_values_are_the_gray_code_of_even_intervals():
    bits = (3, 1, 2)
    values = np.random.default_rng(0).uniform(-1.2, 1.2, (50, 3)).astype(np.float32)
    signs = np.where(np.asarray(fold(jnp.asarray(values), bits)) > 0, 1.0, -1.0)
    inside = np.clip(values, -1, 1 - 1e-6)
    starts = np.cumsum((0, *bits))
    for channel, (start, count) in enumerate(zip(starts, bits, strict=False)):
        index = np.floor((inside[:, channel] + 1) / 2 * 2**count).astype(int)
        gray = index ^ index >> 1
        expected = [[1 if code >> bit & 1 else -1 for bit in reversed(range(count))] for code in gray]
        # Bits after the first are 1 in the middle of an interval, as in the reflected code.
        np.testing.assert_array_equal(signs[:, start : start + count], expected)
        centres = (index + 0.5) / 2**count * 2 - 1
        np.testing.assert_allclose(unfold(jnp.asarray(signs), bits)[:, channel], centres, atol=1e-6)


def test_weighted_clips_have_a_better_mean_psnr_than_equal_ones():
    rng = np.random.default_rng(0)
    # High contrast in four directions, and low contrast in two others.
    deviations = np.repeat([(8, 4, 4, 4, 0, 0), (0, 0, 0, 0, 2, 0.5)], 8, axis=0)[:, None] / 10
    blocks = rng.normal(size=(16, 50, 6)) * deviations

    def mean_log_error(weights):
        mean, directions, _ = principal_components(blocks.reshape(-1, 6), 2, np.repeat(weights / 50, 50))
        lost = (blocks - mean) - (blocks - mean) @ directions @ directions.T
        return np.log(np.square(lost).mean((1, 2)) + 1e-4).mean()

    weights = clip_weights([blocks], 2)
    assert weights.sum() == pytest.approx(1) and mean_log_error(weights) <= mean_log_error(np.full(16, 1 / 16)) - 0.1


def test_gains_use_the_quantizers_range():
    rng = np.random.default_rng(0)
    components = rng.normal(size=(4000, 2)) * (1, 4)
    components -= components.mean(0)
    gains = best_gains(
        components, np.full(4000, 1 / 4000), lambda values: np.clip(np.floor(values * 4) + 0.5, -3.5, 3.5)
    )
    assert 0.25 <= gains[0] <= 0.7 and gains[1] == pytest.approx(gains[0] / 4, rel=0.4)


GRAY = {"head": HeadConfig("lfq"), "latent_channels": 9, "block_bits": (4, 3, 2)}


@pytest.mark.parametrize(
    "knobs",
    [
        {"head": HeadConfig()},
        {"head": HeadConfig("kl")},
        {"head": HeadConfig("fsq", levels=(8, 8, 8, 4, 4, 4))},
        {"head": HeadConfig("lfq")},
        GRAY,
    ],
    ids=["continuous", "kl", "fsq", "lfq", "gray"],
)
def test_a_tokenizer_starts_as_the_least_squares_map_of_its_latents(knobs, clips):
    tokenizer = Tokenizer(dataclasses.replace(CONFIG, **knobs))
    task = TokenizerTask(tokenizer, LossConfig())
    video = np.round((np.clip(clips, -1, 1) + 1) * 127.5).astype(np.uint8)
    params = task.fit(nn.meta.unbox(jax.jit(task.init)(jax.random.key(0))[0]), video)
    exact = video / 127.5 - 1
    apply = jax.jit(tokenizer.apply)
    back, quantized = apply({"params": params["tokenizer"]}, jnp.asarray(exact, jnp.float32))
    bits, latents = tokenizer.config.block_bits, quantized.latents
    latents = np.asarray(unfold(latents, bits) if bits else latents)
    weights = weights_of(exact, len(bits) or tokenizer.config.latent_channels)
    for first, part in ((True, latents[:, :1]), (False, latents[:, 1:])):
        blocks, rows = blocks_of(exact, first), part.reshape(-1, latents.shape[-1]).astype(np.float64)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
        root = np.sqrt(weights[first])[:, None]
        expected = rows @ np.linalg.lstsq(rows * root, blocks * root, rcond=None)[0]
        np.testing.assert_allclose(blocks_of(np.asarray(back), first), expected, atol=1e-3)


def test_bits_spent_by_variance_lose_less_than_a_bit_a_component(clips):
    def quantize(z):
        return jnp.where(z > 0, 1.0, -1.0)

    def error(bits):
        analysis, synthesis = fit(clips, 9, STRIDES, bits, quantize)
        signs = quantize(Analysis(9, STRIDES, bits).apply({"params": analysis}, clips, True))
        return np.square(Synthesis(STRIDES, bits).apply({"params": synthesis}, signs, True) - clips).mean()

    assert error(GRAY["block_bits"]) < 0.6 * error(())


@pytest.mark.parametrize(
    "knobs", [{"block_bits": (4, 2)}, {**GRAY, "latent_channels": 8}, {**GRAY, "block_transform": False}]
)
def test_bits_that_fit_no_head_are_refused(knobs):
    with pytest.raises(ValueError, match="block_bits"):
        dataclasses.replace(CONFIG, **knobs)


def filled(module, *inputs):
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def test_chunks_give_what_the_whole_gives_and_no_later_frame_is_seen():
    tokenizer, video = Tokenizer(CONFIG), smooth(2, frames=7)
    variables = filled(tokenizer, video)
    encode, decode = (jax.jit(functools.partial(tokenizer.apply, variables, method=m)) for m in ("encode", "decode"))
    whole, _ = encode(video)
    first, cache = encode(video[:, :3])
    rest, _ = encode(video[:, 3:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, rtol=1e-5, atol=1e-5)
    decoded, _ = decode(whole)
    start, cache = decode(whole[:, :1])
    end, _ = decode(whole[:, 1:], cache)
    np.testing.assert_allclose(jnp.concatenate([start, end], 1), decoded, rtol=1e-5, atol=1e-5)
    slope = jax.jit(jax.grad(lambda video: encode(video)[0][:, 1].sum()))(video)
    assert np.abs(slope[:, :3]).max() > 0
    np.testing.assert_array_equal(slope[:, 3:], np.zeros_like(slope[:, 3:]))
