"""The published ways of measuring FVD with the same network, which give different numbers.

They differ by resizing and by the covariance's divisor. Numbers of different protocols are not comparable.
"""

import numpy as np

from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol, Prepared
from walt_jax.evaluation.i3d import SIDE
from walt_jax.evaluation.resize import bilinear, cover_and_crop


def _tf1(clip: Clip) -> Prepared:
    return bilinear(clip, SIDE, SIDE, "tf1") * np.float32(2 / 255) - 1


def _stylegan_v(clip: Clip) -> Prepared:
    return bilinear(clip, SIDE, SIDE, "half_pixel") * np.float32(2 / 255) - 1


def _common(clip: Clip) -> Prepared:
    return cover_and_crop(clip, SIDE, "half_pixel") * np.float32(2 / 255) - 1


FVD_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        FeatureProtocol(
            "fvd_tf1",
            "i3d",
            _tf1,
            "squashed to 224 × 224 by TensorFlow 1's bilinear interpolation (no half-pixel offset, no antialiasing)",
            1,
            "google-research/frechet_video_distance; MAGVIT, and so W.A.L.T",
        ),
        FeatureProtocol(
            "fvd_stylegan_v",
            "i3d",
            _stylegan_v,
            "squashed to 224 × 224 by bilinear interpolation with half-pixel centres, no antialiasing",
            0,
            "StyleGAN-V",
        ),
        FeatureProtocol(
            "fvd_common",
            "i3d",
            _common,
            "short side to 224 by bilinear interpolation with half-pixel centres, no antialiasing; centre crop",
            1,
            "common_metrics_on_video_quality, method styleganv",
        ),
    )
}
