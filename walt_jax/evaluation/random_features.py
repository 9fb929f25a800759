"""Stand-ins for I3D and Inception without their weights: features of a small convolutional network, randomly drawn.

What is measured with them is named `frechet_random_features` and `frechet_random_image_features`, and compares with
nothing that is published. They notice colours, edges and, in videos, motion over two frames, and know nothing of what
is shown.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from walt_jax.evaluation.feature_protocol import FeatureProtocol
from walt_jax.evaluation.features import Detector, digest_of
from walt_jax.evaluation.resize import bilinear
from walt_jax.tokenizer.convolution import convolve

SIDE = 64
WIDTHS = (3, 32, 64)
KERNEL = (2, 5, 5)  # of images (1, 5, 5)
STRIDES = (1, 2, 2)


def prepare(clip: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t 64 64 3"]:
    """Squashed to 64 × 64, in -1..1."""
    return bilinear(clip, SIDE, SIDE, "half_pixel") * np.float32(2 / 255) - 1


RESIZE = "squashed to 64 × 64 by bilinear interpolation with half-pixel centres, no antialiasing"
RANDOM_PROTOCOL = FeatureProtocol(
    "frechet_random_features", "random", prepare, RESIZE, 1, "this project alone; not FVD"
)
RANDOM_IMAGE_PROTOCOL = FeatureProtocol(
    "frechet_random_image_features", "random_images", prepare, RESIZE, 1, "this project alone; not FID"
)


def random_detector(images: bool = False) -> Detector:
    """Two strided convolutions with ReLU; the mean and standard deviation of each layer's channels over all positions.

    The weights are drawn with a fixed seed, so all machines have the same.

    Args:
        images: whether single frames are measured: kernels then have no extent in time.
    """
    rng = np.random.RandomState(0)
    kernels, size = [], (1, *KERNEL[1:]) if images else KERNEL
    for into, out in itertools.pairwise(WIDTHS):
        shape = (*size, into, out)
        kernels.append((rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32))
    digest = digest_of(*(kernel.tobytes() for kernel in kernels))
    compute = functools.partial(jax.jit(_features), [jnp.asarray(kernel) for kernel in kernels])
    name = "a stand-in with random weights, walt_jax/evaluation/random_features.py"
    return Detector(name, digest, 2 * sum(WIDTHS[1:]), size[0], compute)


def _features(kernels: list[Array], x: Float[Array, "b t 64 64 3"]) -> Float[Array, "b d"]:
    found = []
    for kernel in kernels:
        x = jax.nn.relu(convolve(x, kernel, STRIDES))
        found += [x.mean(axis=(1, 2, 3)), x.std(axis=(1, 2, 3))]
    return jnp.concatenate(found, axis=-1)
