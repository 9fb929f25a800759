"""The published ways of measuring FVD with the same network, which give different numbers.

They differ by resizing and by the covariance's divisor. Numbers of different protocols are not comparable.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.evaluation.i3d import SIDE
from walt_jax.evaluation.resize import bilinear, cover_and_crop

Clip = UInt8[np.ndarray, "t h w 3"]
Prepared = Float[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class FvdProtocol:
    """How clips get to I3D and what its features are compared by.

    Attributes:
        name: `fvd_…`; it is the metric's name too.
        prepare: a clip of any size to 224 × 224 pixels in -1..1.
        resize: what `prepare` does, in words.
        ddof: the covariance is divided by n - ddof.
        source: who measures this way.
    """

    name: str
    prepare: Callable[[Clip], Prepared]
    resize: str
    ddof: int
    source: str

    @property
    def divisor(self) -> str:
        return "N - 1" if self.ddof else "N"


def _tf1(clip: Clip) -> Prepared:
    return bilinear(clip, SIDE, SIDE, "tf1") * np.float32(2 / 255) - 1


def _stylegan_v(clip: Clip) -> Prepared:
    return bilinear(clip, SIDE, SIDE, "half_pixel") * np.float32(2 / 255) - 1


def _common(clip: Clip) -> Prepared:
    return cover_and_crop(clip, SIDE, "half_pixel") * np.float32(2 / 255) - 1


FVD_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        FvdProtocol(
            "fvd_tf1",
            _tf1,
            "squashed to 224 × 224 by TensorFlow 1's bilinear interpolation (no half-pixel offset, no antialiasing)",
            1,
            "google-research/frechet_video_distance; MAGVIT, and so W.A.L.T",
        ),
        FvdProtocol(
            "fvd_stylegan_v",
            _stylegan_v,
            "squashed to 224 × 224 by bilinear interpolation with half-pixel centres, no antialiasing",
            0,
            "StyleGAN-V",
        ),
        FvdProtocol(
            "fvd_common",
            _common,
            "short side to 224 by bilinear interpolation with half-pixel centres, no antialiasing; centre crop",
            1,
            "common_metrics_on_video_quality, method styleganv",
        ),
    )
}
