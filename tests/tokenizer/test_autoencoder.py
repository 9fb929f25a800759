"""The tokenizer's shapes, causality in time, per-frame norms, config errors and the names of its parameters' axes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.tokenizer.autoencoder import FrameNorm, Tokenizer, TokenizerConfig

# Clips of 1 + 4n frames; the strides differ by axis, so that axes that are mixed up show.
CONFIG = TokenizerConfig(
    latent_channels=3,
    base_channels=4,
    channel_multipliers=(1, 2, 2),
    downsample=((2, 2, 2), (2, 1, 2)),
    residual_blocks=1,
    norm_groups=2,
    patch_size=2,
)
FRAMES, STRIDE = 9, 4
TOKENIZER = Tokenizer(CONFIG)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(module, *inputs):
    """The module's parameters, all random: what is zero at initialisation would hide mistakes."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.5 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def variables():
    return filled(TOKENIZER, normal(0, 1, FRAMES, 4, 8, 3))


@pytest.fixture(scope="module")
def encode(variables):
    return jax.jit(lambda video: TOKENIZER.apply(variables, video, method="encode")[0])


@pytest.fixture(scope="module")
def decode(variables):
    return jax.jit(lambda latents: TOKENIZER.apply(variables, latents, method="decode")[0])


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)), max_size=3),
    st.integers(1, 2),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_shapes(n, places, downsample, patch_size, dtype):
    config = TokenizerConfig(5, 4, (1,) * (len(downsample) + 1), tuple(downsample), 1, 2, patch_size, dtype)
    time, height, width = (math.prod(strides[axis] for strides in downsample) for axis in range(3))
    assert config.strides == (time, height * patch_size, width * patch_size)
    clip = (1 + n * time, places[0] * height * patch_size, places[1] * width * patch_size)
    assert config.latent_shape(*clip) == (1 + n, *places, 5)
    video = jax.ShapeDtypeStruct((2, *clip, 3), jnp.float32)
    (reconstruction, quantized), _ = jax.eval_shape(Tokenizer(config).init_with_output, jax.random.key(0), video)
    latents = quantized.latents
    assert latents.shape == (2, 1 + n, *places, 5)
    assert reconstruction.shape == video.shape
    assert {latents.dtype, reconstruction.dtype} == {jnp.dtype(jnp.float32)}


def test_the_papers_shape():
    """17 × 128² becomes 5 × 16²; an image of 256² becomes 32² where there are three halvings of space."""
    strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    config = TokenizerConfig(8, 128, (1, 2, 2, 4), strides, 4, 32)
    assert config.latent_shape(17, 128, 128) == (5, 16, 16, 8)
    assert config.latent_shape(1, 256, 256) == (1, 32, 32, 8)


@pytest.mark.parametrize("clip", [(8, 8, 16), (9, 6, 16), (9, 8, 12), (0, 8, 16)])
def test_clips_that_the_strides_do_not_divide_are_refused(clip):
    with pytest.raises(ValueError, match=r"1 \+ 4n frames, a multiple of 4 for height and of 8 for width, not \d"):
        CONFIG.latent_shape(*clip)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"downsample": ((2, 2, 2),)}, "downsample has 1 entries; 3 channel_multipliers"),
        ({"channel_multipliers": (1, 2)}, "downsample has 2 entries; 2 channel_multipliers"),
        ({"norm_groups": 3}, "norm_groups=3 does not divide 4 channels"),
        ({"norm_groups": 8}, "norm_groups=8 does not divide 4 channels"),
        ({"taps": 1}, "taps=1 is less than a stride in time"),
    ],
)
def test_configs_that_can_not_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**{**vars(CONFIG), **changed})


def newest_seen(function, x):
    """For each output frame the last input frame that it depends on; all the later ones' gradients are exactly 0."""

    @jax.jit
    def gradients(x):
        y, back = jax.vjp(function, x)
        return jax.vmap(back)(jnp.eye(y.shape[1])[:, None, :, None, None, None] * normal(9, *y.shape)[None])[0]

    seen = np.any(np.asarray(gradients(x)) != 0, axis=(1, 3, 4, 5))
    return [int(np.flatnonzero(row).max()) for row in seen]


LATENTS = 1 + (FRAMES - 1) // STRIDE
DECODED_FROM = [math.ceil(frame / STRIDE) for frame in range(FRAMES)]  # frame 0 from the first, then STRIDE frames each


def test_encoding_is_causal(encode):
    assert newest_seen(encode, normal(1, 1, FRAMES, 4, 8, 3)) == [STRIDE * latent for latent in range(LATENTS)]


def test_decoding_is_causal(decode):
    assert newest_seen(decode, normal(1, 1, LATENTS, 1, 1, 3)) == DECODED_FROM


def test_a_reconstructed_frame_depends_on_no_pixel_after_its_latent(variables):
    newest = newest_seen(lambda video: TOKENIZER.apply(variables, video)[0], normal(1, 1, FRAMES, 4, 8, 3))
    assert newest == [STRIDE * latent for latent in DECODED_FROM]


@pytest.mark.parametrize("latents", [1, 2])
def test_the_latents_of_a_prefix_are_the_prefix_of_the_latents_and_so_for_pixels(encode, decode, latents):
    """With one frame: the first latent is the image's."""
    frames = 1 + STRIDE * (latents - 1)
    video = normal(2, 1, FRAMES, 4, 8, 3)  # as in the tests above: compiled already
    whole = encode(video)
    np.testing.assert_allclose(encode(video[:, :frames]), whole[:, :latents], atol=1e-5)
    np.testing.assert_allclose(decode(whole[:, :latents]), decode(whole)[:, :frames], atol=1e-5)


def normalised(x, groups):
    """The twin: in numpy and double precision, a frame and a group at a time."""
    x, out = np.asarray(x, np.float64), np.empty(x.shape)
    width = x.shape[-1] // groups
    for clip, frame, group in np.ndindex(*x.shape[:2], groups):
        channels = slice(group * width, (group + 1) * width)
        values = x[clip, frame, :, :, channels]
        out[clip, frame, :, :, channels] = (values - values.mean()) / np.sqrt(values.var() + 1e-6)
    return out


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_the_norm_has_statistics_of_a_frame_and_group(frames, groups, width, seed):
    x = 3 + 2 * normal(seed, 2, frames, 3, 2, groups * width)
    module = FrameNorm(groups, jnp.float32)
    variables = filled(module, x)
    scale, shift = (np.asarray(variables["params"][name]) for name in ("scale", "shift"))
    ours = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(ours, normalised(x, groups) * scale + shift, atol=1e-4)


@pytest.mark.parametrize(("latents", "factor"), [(1, 1), (3, 1), (3, 2), (2, 4)])
def test_the_adaptive_norm_scales_a_frame_by_the_latent_frame_that_it_is_decoded_from(latents, factor):
    frames = 1 + factor * (latents - 1)
    x, condition = normal(0, 2, frames, 4, 2, 6), normal(1, 2, latents, 2, 1, 3)
    module = FrameNorm(2, jnp.float32)
    variables = filled(module, x, condition)
    affine = jax.tree.map(np.asarray, variables["params"]["affine"])
    expected = normalised(x, 2)
    for clip, frame in np.ndindex(2, frames):
        latent = 0 if frame == 0 else 1 + (frame - 1) // factor
        pooled = np.asarray(condition)[clip, latent].reshape(-1, 3).mean(0)
        scale, shift = np.split(pooled @ affine["kernel"] + affine["bias"], 2)
        expected[clip, frame] = expected[clip, frame] * (1 + scale) + shift
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x, condition), expected, atol=1e-4)


def test_at_initialisation_the_adaptive_norm_is_plain():
    x, condition = normal(0, 1, 3, 2, 2, 4), normal(1, 1, 2, 2, 2, 3)
    y, _ = FrameNorm(2, jnp.float32).init_with_output(jax.random.key(0), x, condition)
    np.testing.assert_allclose(y, normalised(x, 2), atol=1e-4)


def test_every_parameter_has_a_name_for_each_axis():
    video = jax.ShapeDtypeStruct((1, FRAMES, 4, 8, 3), jnp.float32)
    boxed = jax.eval_shape(TOKENIZER.init, jax.random.key(0), video)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    assert len(named) > 30
    for path, leaf in named.items():
        assert isinstance(leaf, nn.Partitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert leaf.names[-1] is not None, path
