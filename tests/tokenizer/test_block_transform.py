"""The linear way beside the convolutions: a cosine transform at the start, causal, and the same in chunks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.block_transform import Analysis, Synthesis, lowest_frequencies
from walt_jax.tokenizer.quantizers import HeadConfig

STRIDES = (2, 2, 4)
CONFIG = TokenizerConfig(6, 4, (1, 2), ((2, 1, 2),), 1, 2, patch_size=2, block_transform=True)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def smooth(seed, frames=5, height=4, width=8):
    """Clips of slow waves in -1..1."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(*(np.arange(n) for n in (frames, height, width)), indexing="ij")
    speed, phase = rng.uniform(0, 0.3, (3, 3)), rng.uniform(0, 6, 3)
    waves = [np.sin(s[0] * t + s[1] * y + s[2] * x + p) for s, p in zip(speed, phase, strict=True)]
    return np.stack(waves, -1)[None].astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), st.integers(1, 12))
def test_the_patterns_are_orthogonal_and_the_first_is_the_mean(sizes, count):
    patterns, deviations = lowest_frequencies(sizes, count)
    there = min(count, 3 * int(np.prod(sizes)))
    products = patterns.T @ patterns / len(patterns)
    np.testing.assert_allclose(products, np.diag([1.0] * there + [0.0] * (count - there)), atol=1e-9)
    np.testing.assert_allclose(patterns[:, 0], np.ones(len(patterns)))
    assert (np.diff(deviations[:there]) <= 0).all()


def transformed(video, channels):
    """The twin: each block's products with the patterns, and the block from these."""
    frames, height, width = video.shape[1:4]
    starts = [(0, 1), *((t, STRIDES[0]) for t in range(1, frames, STRIDES[0]))]
    latents = np.zeros((1, len(starts), height // STRIDES[1], width // STRIDES[2], channels))
    back = np.zeros_like(video)
    for index, (t, length) in enumerate(starts):
        patterns, deviations = lowest_frequencies((length, *STRIDES[1:]), channels)
        for j, k in np.ndindex(*latents.shape[2:4]):
            block = np.s_[0, t : t + length, 2 * j : 2 * j + 2, 4 * k : 4 * k + 4]
            products = patterns.T @ video[block].ravel() / len(patterns)
            latents[0, index, j, k] = products / deviations
            back[block] = (patterns @ products).reshape(length, 2, 4, 3)
    return latents, back


def test_it_starts_as_a_cosine_transform():
    video = smooth(0)
    analysis, synthesis = Analysis(6, STRIDES), Synthesis(STRIDES)
    latents, _ = analysis.init_with_output(jax.random.key(0), video, True)
    back, _ = synthesis.init_with_output(jax.random.key(0), latents, True)
    expected, expected_back = transformed(video, 6)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    np.testing.assert_allclose(back, expected_back, atol=1e-5)


def test_with_as_many_channels_as_values_nothing_is_lost():
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 4, 8, 3)).astype(np.float32)
    channels = 3 * int(np.prod(STRIDES))
    latents, _ = Analysis(channels, STRIDES).init_with_output(jax.random.key(0), video, True)
    back, _ = Synthesis(STRIDES).init_with_output(jax.random.key(0), latents, True)
    np.testing.assert_allclose(back, video, atol=1e-4)


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig("kl")])
def test_a_tokenizer_starts_there(head):
    tokenizer = Tokenizer(dataclasses.replace(CONFIG, head=head))
    video = smooth(1)
    (reconstruction, quantized), _ = jax.jit(tokenizer.init_with_output)(jax.random.key(0), video)
    latents, back = transformed(video, 6)
    np.testing.assert_allclose(quantized.latents, latents, atol=1e-5)
    np.testing.assert_allclose(reconstruction, back, atol=1e-5)


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
