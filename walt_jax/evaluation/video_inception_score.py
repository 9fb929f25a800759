"""The inception score of video, by C3D's classes (Saito et al. 2020; StyleGAN-V, MAGVIT)."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from walt_jax.evaluation import c3d
from walt_jax.evaluation.detector_weights import find_weights
from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol, Prepared
from walt_jax.evaluation.features import Detector, read_together
from walt_jax.evaluation.inception_score import inception_score
from walt_jax.evaluation.resize import bilinear

SPLITS = 10
NAME = "inception_score_c3d"


def prepare(clip: Clip) -> Prepared:
    """In 0..255."""
    return bilinear(clip, c3d.SIDE, c3d.SIDE, "align_corners")


C3D_PROTOCOL = FeatureProtocol(
    NAME,
    "c3d",
    prepare,
    "squashed to 112 × 112 by bilinear interpolation with aligned corners, no antialiasing",
    0,
    "TGANv2, MAGVIT, StyleGAN-V",
)


def c3d_detector(path: pathlib.Path) -> Detector:
    """C3D's logits.

    Args:
        path: a folder with TGANv2's two files, or one file, see `c3d.weights_from`.

    Raises:
        UserError: if it does not hold the weights.
    """
    tensors, digest = read_together(c3d.files_of(path))
    weights = c3d.weights_from(tensors, str(path))
    compute = functools.partial(jax.jit(c3d.logits), weights)
    return Detector("C3D (UCF-101), logits", digest, c3d.CLASSES, c3d.FRAMES, compute, longest=c3d.FRAMES)


def find_c3d(weights: Mapping[str, str]) -> Detector | None:
    """The network; None where the user gives no weights of it.

    Raises:
        UserError: if they can't be read.
    """
    path = find_weights("c3d", weights)
    return None if path is None else c3d_detector(path)


def score(detector: Detector, logits: Float[np.ndarray, "n 101"], cut: str) -> list[dict[str, Any]]:
    """The inception score as a metric; none of fewer videos than `SPLITS`.

    Args:
        detector: what gave the logits.
        logits: of each video.
        cut: which frames these are.
    """
    if len(logits) < SPLITS:
        return []
    value, std = inception_score(logits, SPLITS)
    return [
        {
            "name": NAME,
            "value": value,
            "unit": "",
            "protocol": f"inception score of {len(logits)} videos, {cut}; mean over {SPLITS} splits after a shuffle "
            f"with seed 2020; {C3D_PROTOCOL.resize}; {detector.name}, weights of SHA-256 {detector.sha256[:12]}…. It "
            "grows with the count: MAGVIT's are of 10,000 videos in one part, StyleGAN-V's of 2,048 in 10 splits",
            "standard_deviation": std,
            "count": len(logits),
            "frames": c3d.FRAMES,
            "cut": cut,
            "resize": C3D_PROTOCOL.resize,
            "detector": detector.name,
            "detector_sha256": detector.sha256,
        }
    ]
