"""The published ways of measuring FID, KID and the inception score with one network; their numbers differ.

They differ by how images get to 299 × 299 pixels, which changes an FID by whole points where images are small.
"""

import numpy as np
from PIL import Image

from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol, Prepared
from walt_jax.evaluation.inception import SIDE
from walt_jax.evaluation.resize import bilinear


def _tf1(images: Clip) -> Prepared:
    return (bilinear(images, SIDE, SIDE, "tf1") - 128) / np.float32(128)


def _pytorch(images: Clip) -> Prepared:
    return bilinear(images, SIDE, SIDE, "half_pixel") * np.float32(2 / 255) - 1


def _clean(images: Clip) -> Prepared:
    """PIL's bicubic interpolation, which antialiases, of each colour in floats."""

    def channel(values: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(values.astype(np.float32), mode="F")
        return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255)

    resized = [np.stack([channel(image[..., colour]) for colour in range(3)], axis=-1) for image in images]
    return (np.stack(resized) - 128) / np.float32(128)


IMAGE_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        FeatureProtocol(
            "fid_tf1",
            "inception",
            _tf1,
            "squashed to 299 × 299 by TensorFlow 1's bilinear interpolation (no half-pixel offset, no antialiasing), "
            "(x - 128) / 128",
            1,
            "TTUR's graph, so ADM's evaluation suite; torch-fidelity",
        ),
        FeatureProtocol(
            "fid_pytorch",
            "inception",
            _pytorch,
            "squashed to 299 × 299 by bilinear interpolation with half-pixel centres, no antialiasing, 2x - 1",
            1,
            "pytorch-fid",
        ),
        FeatureProtocol(
            "fid_clean",
            "inception",
            _clean,
            "squashed to 299 × 299 by PIL's bicubic interpolation (antialiased) of floats, clipped, (x - 128) / 128",
            1,
            "clean-fid",
        ),
    )
}
