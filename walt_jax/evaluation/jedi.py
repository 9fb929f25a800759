"""JEDi (Luo et al. 2025): the kernel distance of V-JEPA's features of real and generated videos."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from walt_jax.evaluation import vjepa
from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol, Prepared
from walt_jax.evaluation.features import Detector, read_together
from walt_jax.evaluation.kernel_distance import kernel_distance
from walt_jax.evaluation.resize import cover_and_crop

PUBLISHED_COUNT = 5000


def prepare(clip: Clip) -> Prepared:
    """With ImageNet's mean and standard deviation taken off."""
    resized = cover_and_crop(clip, vjepa.SIDE, "half_pixel") / np.float32(255)
    return (resized - vjepa.MEAN[None, None, None]) / vjepa.STD[None, None, None]


JEDI_PROTOCOL = FeatureProtocol(
    "jedi",
    "vjepa",
    prepare,
    "short side to 224 by bilinear interpolation with half-pixel centres, no antialiasing; centre crop (JEDi's package "
    "leaves resizing to its user)",
    1,
    "oooolga/JEDi",
)


def vjepa_detector(path: pathlib.Path) -> Detector:
    """The features of V-JEPA's pooler.

    Args:
        path: a folder with Meta's two files, or one file with the names of both, see `vjepa.weights_from`.

    Raises:
        UserError: if it does not hold the weights.
    """
    tensors, digest = read_together(vjepa.files_of(path))
    network = vjepa.weights_from(tensors, str(path))
    name = "V-JEPA ViT-H/16, the pooler of its Something-Something v2 probe"
    compute = functools.partial(jax.jit(vjepa.features), network)
    return Detector(name, digest, vjepa.FEATURES, vjepa.FRAMES, compute, longest=vjepa.FRAMES)


def jedi(
    features: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    where: str,
    prefix: str,
    stated: Mapping[str, Any],
) -> dict[str, Any]:
    """The distance as a metric: 100 · MMD² under (x·y / d)², a sample's kernel with itself included.

    Args:
        features, real: of generated and real videos.
        where: how many and which, and with what network, for the protocol's sentence.
        prefix: of the metric's name.
        stated: what else stands beside the number.
    """
    protocol = f"100 · kernel distance (polynomial of degree 2 without constant, biased MMD²) of {where}"
    if min(len(features), len(real)) < PUBLISHED_COUNT:
        protocol += f". Biased: published ones are of {PUBLISHED_COUNT:,} videos each, and fewer give more"
    value = 100 * kernel_distance(features, real, degree=2, coefficient=0.0, biased=True)
    return {"name": f"{prefix}jedi", "value": value, "unit": "", "protocol": protocol, **stated}
