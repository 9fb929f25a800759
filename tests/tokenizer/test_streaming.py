"""Chunks of any sizes give what the whole clip gives; the cache is plain data of one size; files stream as they are."""

import functools
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from walt_jax.generation.codec import CHUNK_LATENTS, Codec, TrainedTokenizer
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.quantizers import HeadConfig

# Clips of 1 + 4n frames, halved twice in time, so that chunks of chunks are streamed too. Space keeps its size, so that
# the scales share what is compiled.
SHAPE = {"base_channels": 4, "channel_multipliers": (1, 1, 1), "residual_blocks": 1, "norm_groups": 2}
CONFIG = TokenizerConfig(3, downsample=((2, 1, 1), (2, 1, 1)), **SHAPE)
CODED = TokenizerConfig(3, downsample=((2, 1, 1), (2, 1, 1)), **SHAPE, head=HeadConfig("fsq", levels=(5, 4, 3)))
FRAMES, STRIDE, LATENTS = 13, 4, 4


# A failure is not made simpler: each plan that were tried for that would be compiled.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(config):
    """A tokenizer's variables, all random: what is zero at initialisation would hide mistakes."""
    _, height, width = config.strides
    video = jax.ShapeDtypeStruct((1, 1, height, width, 3), jnp.float32)
    leaves, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(Tokenizer(config).init, jax.random.key(0), video)))
    return tree.unflatten([0.5 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


pytestmark = pytest.mark.usefixtures("quick_compilation")


VARIABLES = filled(CONFIG)
VIDEO = normal(1, 1, FRAMES, 2, 4, 3)


def encode(chunk, cache=None):
    """Not compiled: each size of chunk with each number of waiting frames would be one more program."""
    return Tokenizer(CONFIG).apply(VARIABLES, chunk, cache, method="encode")


def tokenize(chunk, cache=None):
    return Tokenizer(CODED).apply(VARIABLES, chunk, cache, method="tokenize")


@jax.jit
def decode(chunk, cache=None):
    return Tokenizer(CONFIG).apply(VARIABLES, chunk, cache, method="decode")


@functools.cache
def whole():
    """(latents, codes, video) of the clip in one piece."""

    @jax.jit
    def run(video):
        latents, _ = Tokenizer(CONFIG).apply(VARIABLES, video, method="encode")
        indices, _ = Tokenizer(CODED).apply(VARIABLES, video, method="tokenize")
        return latents, indices

    latents, indices = run(VIDEO)
    return latents, indices, decode(latents)[0]


def streamed(function, x, sizes):
    """Results of the chunks of the given sizes, and the cache after the last."""
    results, cache, start = [], None, 0
    for size in sizes:
        result, cache = function(x[:, start : start + size], cache)
        results.append(result)
        start += size
    return results, cache


def close(mine, other):
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * np.abs(other).max())


@st.composite
def plans(draw, total, largest, least):
    """Sizes of chunks that add up to `total`; the first is at least 1, the simplest plan has few large ones."""
    sizes = [largest - draw(st.integers(0, largest - 1))]
    while sum(sizes) < total:
        sizes.append(largest - draw(st.integers(0, largest - least)))
    return [*sizes[:-1], sizes[-1] - (sum(sizes) - total)]


@settings(max_examples=10, deadline=None, phases=PHASES)
@given(plans(FRAMES, largest=7, least=0), st.booleans())
def test_chunks_of_any_sizes_are_encoded_as_the_whole_is(sizes, coded):
    latents, indices, _ = whole()
    chunks, _ = streamed(tokenize if coded else encode, VIDEO, sizes)
    arrived = np.cumsum([chunk.shape[1] for chunk in chunks])
    # Each latent frame comes with the frame that completes it, neither later nor earlier.
    assert arrived.tolist() == [1 + (frames - 1) // STRIDE for frames in np.cumsum(sizes)]
    if coded:
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), indices)
    else:
        close(np.concatenate(chunks, axis=1), latents)


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(plans(LATENTS, largest=2, least=1))
def test_chunks_of_latents_are_decoded_as_the_whole_is(sizes):
    latents, _, video = whole()
    chunks, _ = streamed(decode, latents, sizes)
    assert [chunk.shape[1] for chunk in chunks] == [1 + STRIDE * (sizes[0] - 1), *(STRIDE * n for n in sizes[1:])]
    close(np.concatenate(chunks, axis=1), video)


def through_flax(cache):
    return flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, cache), flax.serialization.to_bytes(cache))


def through_pickle(cache):
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, cache)))


@pytest.mark.parametrize("round_trip", [through_flax, through_pickle])
def test_a_stream_goes_on_from_a_cache_that_was_saved(round_trip):
    latents, _, _ = whole()
    for function, x, sizes in [(encode, VIDEO, (7, 6)), (decode, latents, (2, 2))]:
        (_, expected), _ = streamed(function, x, sizes)
        _, cache = streamed(function, x, sizes[:1])
        saved = round_trip(cache)
        assert jax.tree.structure(saved) == jax.tree.structure(cache)
        after, _ = function(x[:, sizes[0] :], saved)
        np.testing.assert_array_equal(after, expected)


def size_in_bytes(cache):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def test_the_cache_does_not_grow_with_the_prefix():
    latents, _, _ = whole()
    # The same number of frames waits after each pair.
    for short, long in [([1], [1, 4, 4, 4]), ([7], [7, 4]), ([5], [1, 7, 5])]:
        sizes = [size_in_bytes(streamed(encode, VIDEO, plan)[1]) for plan in (short, long)]
        assert sizes[0] == sizes[1] > 0
    sizes = [size_in_bytes(streamed(decode, latents, plan)[1]) for plan in ([1], [2, 2])]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("sizes", [[1, 7, 5], [6, 7]])
def test_the_first_frame_is_encoded_as_the_image_that_it_is(sizes):
    image, _ = encode(VIDEO[:, :1])
    first = streamed(encode, VIDEO, sizes)[0][0][:, :1]
    if sizes[0] == 1:
        np.testing.assert_array_equal(first, image)
    else:
        # Not to the last bit: XLA adds up in another order when there are more frames.
        close(first, image)
    codes, _ = tokenize(VIDEO[:, :1])
    np.testing.assert_array_equal(whole()[1][:, :1], codes)
    np.testing.assert_array_equal(streamed(tokenize, VIDEO, sizes)[0][0][:, :1], codes)


def test_no_frame_of_a_streamed_decode_depends_on_a_later_latent():
    latents = whole()[0][:, :3]

    @jax.jit
    def change(direction):
        def function(latents):
            return jnp.concatenate(streamed(decode, latents, (1, 2))[0], axis=1)

        return jax.jvp(function, (latents,), (direction,))[1]

    reached = []
    for latent in range(3):
        changes = np.asarray(change(normal(9, *latents.shape).at[:, :latent].set(0).at[:, latent + 1 :].set(0)))
        reached.append(int(np.flatnonzero(np.any(changes != 0, axis=(0, 2, 3, 4))).min()))
    assert reached == [0, 1, 1 + STRIDE]


@functools.cache
def by_route(route):
    """Latents and video by a route, whole and streamed."""
    config = TokenizerConfig(3, downsample=((2, 2, 1),), **{**SHAPE, "channel_multipliers": (1, 1)}, route=route)
    variables = filled(config)

    @jax.jit
    def run(video, latents):
        def step(method):
            return lambda chunk, cache=None: Tokenizer(config).apply(variables, chunk, cache, method=method)

        pairs = [(step("encode"), video, (4, 3)), (step("decode"), latents, (2, 2))]
        return [
            (function(x)[0], jnp.concatenate(streamed(function, x, sizes)[0], axis=1)) for function, x, sizes in pairs
        ]

    return run(VIDEO[:, :7], normal(2, 1, 4, 1, 4, 3))


@pytest.mark.parametrize("route", ["folded", "direct"])
def test_both_routes_stream_and_agree(route):
    for (mine, in_chunks), (other, _) in zip(by_route(route), by_route("folded"), strict=True):
        close(in_chunks, mine)
        close(mine, other)


# Two frames a latent frame, so that a file has several chunks soon.
SMALL = TokenizerConfig(3, downsample=((2, 2, 1),), **{**SHAPE, "channel_multipliers": (1, 1)}, patch_size=2)
FIRST, LATER, WHOLE_LATENTS = 1 + 2 * CHUNK_LATENTS, 2 * CHUNK_LATENTS, 1 + 3 * CHUNK_LATENTS
CODEC = Codec(Tokenizer(SMALL))
TRAINED = TrainedTokenizer(filled(SMALL), normal(3, 3), 1 + normal(4, 3) ** 2)


def alike(mine, other):
    """Equal but for values that lie on the edge between two levels."""
    difference = np.abs(np.asarray(mine, np.int32) - np.asarray(other, np.int32))
    assert difference.shape == np.asarray(other).shape
    assert difference.max(initial=0) <= 1
    assert np.mean(difference > 0) < 1e-2


def test_a_long_decode_is_the_decode_of_the_whole():
    assert SMALL.strides == (2, 4, 2)
    latents = normal(5, 1, WHOLE_LATENTS, 2, 1, 3)
    expected, _ = CODEC.decode(TRAINED, latents)
    assert np.mean(np.asarray(expected) % 255 > 0) > 0.5  # not all clipped
    alike(CODEC.decode_long(TRAINED, latents), expected)
    alike(CODEC.decode_long(TRAINED, latents[:, :1]), expected[:, :1])


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(st.integers(1, FIRST + LATER + 3), st.integers(5, 8), st.integers(3, 4), st.integers(0, 99))
def test_a_file_of_any_count_and_size_is_streamed_as_the_whole_is(count, height, width, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    ours = list(CODEC.stream(TRAINED, iter(frames)))
    assert len(ours) == count
    assert {(frame.shape, frame.dtype) for frame in ours} == {((height, width, 3), np.dtype(np.uint8))}
    # The twin: at the right and bottom edge, and behind the last frame, the nearest pixel there is.
    time, down, across = (
        np.minimum(np.arange(padded), size - 1)
        for padded, size in zip((FIRST + 2 * LATER, 8, 4), (count, height, width), strict=True)
    )
    clip = frames[time][:, down][:, :, across]
    latents, _ = CODEC.encode(TRAINED, clip[None])
    video, _ = CODEC.decode(TRAINED, latents)
    alike(np.stack(ours), np.asarray(video)[0, :count, :height, :width])


def test_a_file_without_frames_streams_none():
    assert list(CODEC.stream(TRAINED, iter(()))) == []


def test_a_stream_takes_no_more_frames_than_it_gives_back_and_a_chunk():
    taken = []

    def source():
        for index in range(FIRST + 2 * LATER):
            taken.append(index)
            yield np.full((8, 4, 3), index, np.uint8)

    stream = CODEC.stream(TRAINED, source())
    next(stream)
    assert len(taken) == FIRST
    for _ in range(FIRST):
        next(stream)
    assert len(taken) == FIRST + LATER
