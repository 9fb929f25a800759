"""A stand-in for I3D where nobody has its weights: features of a small convolutional network with random weights.

What is measured with it is named `frechet_random_features`, and compares with nothing that is published. It notices
colours, edges and motion over two frames, and knows nothing of what a clip shows.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from walt_jax.evaluation.features import Detector, digest_of
from walt_jax.evaluation.fvd_protocols import FvdProtocol
from walt_jax.evaluation.resize import bilinear
from walt_jax.tokenizer.convolution import convolve

SIDE = 64
WIDTHS = (3, 32, 64)
KERNEL = (2, 5, 5)
STRIDES = (1, 2, 2)


def prepare(clip: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t 64 64 3"]:
    """Squashed to 64 × 64, in -1..1."""
    return bilinear(clip, SIDE, SIDE, "half_pixel") * np.float32(2 / 255) - 1


RANDOM_PROTOCOL = FvdProtocol(
    "frechet_random_features",
    prepare,
    "squashed to 64 × 64 by bilinear interpolation with half-pixel centres, no antialiasing",
    1,
    "this project alone; not FVD",
)


def random_detector() -> Detector:
    """Two strided convolutions with ReLU; the mean and standard deviation of each layer's channels over all positions.

    The weights are drawn with a fixed seed, so all machines have the same.
    """
    rng = np.random.RandomState(0)
    kernels = []
    for into, out in itertools.pairwise(WIDTHS):
        shape = (*KERNEL, into, out)
        kernels.append((rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32))
    digest = digest_of(*(kernel.tobytes() for kernel in kernels))
    compute = functools.partial(jax.jit(_features), [jnp.asarray(kernel) for kernel in kernels])
    name = "a stand-in with random weights, walt_jax/evaluation/random_features.py"
    return Detector(name, digest, 2 * sum(WIDTHS[1:]), KERNEL[0], compute)


def _features(kernels: list[Array], x: Float[Array, "b t 64 64 3"]) -> Float[Array, "b d"]:
    found = []
    for kernel in kernels:
        x = jax.nn.relu(convolve(x, kernel, STRIDES))
        found += [x.mean(axis=(1, 2, 3)), x.std(axis=(1, 2, 3))]
    return jnp.concatenate(found, axis=-1)
