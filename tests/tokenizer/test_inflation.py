"""An inflated tokenizer does with each frame that a latent is of what the image tokenizer does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.inflation import inflate
from walt_jax.tokenizer.quantizers import HeadConfig

# The strides differ by axis, so that channels which upsampling repeats in another order show.
CONFIG = TokenizerConfig(
    latent_channels=3,
    base_channels=4,
    channel_multipliers=(1, 2),
    downsample=((3, 2, 1),),
    residual_blocks=1,
    norm_groups=2,
)
STRIDE, FRAMES, LATENTS = 3, 7, 3


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(config):
    _, height, width = config.strides
    video = jax.ShapeDtypeStruct((1, 1, height, width, 3), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(Tokenizer(config).init, jax.random.key(0), video))


def filled(config):
    """A tokenizer's variables, all random: what is zero at initialisation would hide mistakes."""
    leaves, tree = jax.tree.flatten(shapes(config))
    return tree.unflatten([0.5 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


IMAGES = filled(CONFIG.of_images())
VIDEO = normal(99, 2, FRAMES, 4, 4, 3)


def run(config, variables, method=None):
    return jax.jit(lambda x: Tokenizer(config).apply(variables, x, method=method))


@functools.cache
def expected():
    """What the image tokenizer makes of each frame that a latent is of: latents, and frames again."""
    images = VIDEO[:, ::STRIDE].reshape(2 * LATENTS, 1, *VIDEO.shape[2:])
    frames, quantized = run(CONFIG.of_images(), IMAGES)(images)
    return tuple(x.reshape(2, LATENTS, *x.shape[2:]) for x in (quantized.latents, frames))


def close(mine, other):
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_a_clip_of_one_frame_is_encoded_and_reconstructed_as_the_image():
    latents, frames = expected()
    inflated = inflate(IMAGES, CONFIG, "last")
    clip = VIDEO[:, :1]
    reconstruction, quantized = run(CONFIG, inflated)(clip)
    close(quantized.latents, latents[:, :1])
    close(reconstruction, frames[:, :1])


def test_each_latent_frame_is_that_of_its_last_frame_and_each_frame_the_image_of_its_latent_frame():
    latents, frames = expected()
    inflated = inflate(IMAGES, CONFIG)
    close(run(CONFIG, inflated, "encode")(VIDEO)[0], latents)
    decoded_from = [0] + [1] * STRIDE + [2] * STRIDE
    close(run(CONFIG, inflated, "decode")(latents)[0], frames[:, np.array(decoded_from)])


@pytest.mark.parametrize(("placement", "tap"), [("last", 2), ("central", 1)])
def test_an_images_kernel_is_one_tap_and_the_others_are_zero(placement, tap):
    inflated = inflate(IMAGES, CONFIG, placement)
    leaves = jax.tree_util.tree_leaves_with_path(inflated)
    taken = 0
    for (path, leaf), image in zip(leaves, jax.tree.leaves(IMAGES), strict=True):
        repeats = leaf.shape[-1] // image.shape[-1]
        assert repeats == (3 if "scale1_up" in str(path) else 1), path
        image = np.concatenate([np.asarray(image)] * repeats, axis=-1)
        if leaf.ndim == 5:
            taken += 1
            np.testing.assert_array_equal(leaf[tap], image[0])
            assert not np.any(np.delete(np.asarray(leaf), tap, axis=0)), path
        else:
            np.testing.assert_array_equal(leaf, image)
    # A first one each and the decoder's last, 2 in each of 6 blocks, and one each between scales.
    assert taken == 2 + 1 + 2 * 6 + 2


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig("kl"), HeadConfig("vq", codes=5)])
@pytest.mark.parametrize("placement", ["last", "central"])
def test_the_inflated_has_the_shapes_of_a_fresh_video_tokenizer(head, placement):
    knobs = {**vars(CONFIG), "head": head, "downsample": ((2, 1, 2),)}
    config = TokenizerConfig(**knobs)
    fresh = shapes(config)
    inflated = inflate(filled(config.of_images()), config, placement)
    assert jax.tree.structure(inflated) == jax.tree.structure(fresh)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), inflated) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )


def test_a_codebook_stays_what_it_is():
    config = TokenizerConfig(**{**vars(CONFIG), "head": HeadConfig("vq", codes=5)})
    images = filled(config.of_images())
    jax.tree.map(np.testing.assert_array_equal, inflate(images, config)["codebook"], images["codebook"])


def test_the_image_tokenizer_has_the_videos_scales_in_space_and_none_in_time():
    images = CONFIG.of_images()
    assert images.strides == (1, *CONFIG.strides[1:])
    assert images.latent_shape(1, 4, 6) == CONFIG.latent_shape(1, 4, 6)
    assert images.of_images() == images
    assert {leaf.shape[0] for leaf in jax.tree.leaves(IMAGES["params"]) if leaf.ndim == 5} == {1}
