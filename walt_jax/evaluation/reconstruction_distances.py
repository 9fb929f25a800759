"""rFVD, rFID and others: distances of reconstructions from the clips that they are of."""

from collections.abc import Mapping, Sequence
from typing import Any

from walt_jax.evaluation.distances import Reference, choose, compare
from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol
from walt_jax.evaluation.features import features_of

FVD_FRAMES = 16  # of longer clips the first ones are measured


def reconstruction_distances(
    clips: Sequence[Clip],
    reconstructions: Sequence[Clip],
    names: Sequence[str],
    weights: Mapping[str, str],
    where: str,
) -> list[dict[str, Any]]:
    """The distances of two sets of clips.

    Args:
        clips, reconstructions: all of one size.
        names: of `distances.PROTOCOLS`; those without weights have a stand-in, which says so.
        weights: the user's, see `detector_weights`.
        where: what the clips are, for the protocol's sentence.

    Returns:
        As `distances.compare`; names are "rfvd_tf1", "rkvd_tf1", "rfid_tf1", … and, of stand-ins,
        "reconstruction_frechet_random_features". None for fewer than two clips or images, and
        none by networks of video of clips that are too short for them, as of a tokenizer's stage on images.

    Raises:
        UserError: if weights can't be read.
    """
    metrics: list[dict[str, Any]] = []
    if not names:
        return metrics
    for detector, protocol in choose(names, weights, images=False, stand_in=True):
        frames = measured_frames(protocol, len(clips[0]))
        if detector.refusal(frames):
            continue
        mine, real = (features_of(detector, protocol, some, frames) for some in (reconstructions, clips))
        if min(len(mine), len(real)) < 2:
            continue
        prefix = "r" if protocol.network in ("i3d", "inception", "vjepa") else "reconstruction_"
        unit = "images" if protocol.of_images else "clips"
        cut = f"reconstructions against their originals, {cut_of(protocol, frames, len(clips[0]))}; {where}"
        reference = Reference.of(real, detector, protocol)
        metrics += compare(detector, protocol, mine, reference, cut, unit, prefix, frames=frames)
    return metrics


def measured_frames(protocol: FeatureProtocol, frames: int) -> int:
    """How many frames of clips of so many are measured."""
    return frames if protocol.of_images else min(frames, FVD_FRAMES)


def cut_of(protocol: FeatureProtocol, measured: int, frames: int) -> str:
    """Which frames are measured, in words."""
    if protocol.of_images:
        return "images" if frames == 1 else f"each of {frames} frames alone"
    return f"all {frames} frames" if measured == frames else f"the first {measured} of {frames} frames"
