"""Scores of a run's samples that need no real clips: CLIP's of their captions, and the inception score of video."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from walt_jax.evaluation.clip_score import ClipScorer
from walt_jax.evaluation.feature_protocol import Clip
from walt_jax.evaluation.features import features_of
from walt_jax.evaluation.video_inception_score import C3D_PROTOCOL, find_c3d, score
from walt_jax.parallel.mesh import on_own_devices
from walt_jax.parallel.processes import is_first


def sample_scores(samples: Sequence[Clip], prompts: Sequence[str], weights: Mapping[str, str]) -> list[dict[str, Any]]:
    """The scores whose networks' weights the config names, see `EvaluationConfig.weights`.

    Args:
        samples: all of one size, as they were sampled, before they are compressed.
        prompts: what each was sampled for; "" has no CLIP score.
        weights: files by network.

    Returns:
        As `ClipScorer.metric` and `video_inception_score.score`; no inception score of clips that are too short.

    Raises:
        UserError: if weights can't be read.
    """
    metrics: list[dict[str, Any]] = []
    names = [str(number) for number in range(len(samples))]
    with on_own_devices():
        captions = {name: prompt for name, prompt in zip(names, prompts, strict=True) if prompt}
        scorer = ClipScorer.find(weights, captions)
        c3d = find_c3d(weights)
    if scorer is not None and captions:
        rows = features_of(scorer.detector, scorer.protocol, samples).reshape(len(samples), len(samples[0]), -1)
        with on_own_devices():
            metrics += scorer.metric(dict(zip(names, rows, strict=True)), "samples before compression")
    if c3d is not None and len(samples[0]) < c3d.shortest:
        if is_first():
            needs = f"samples have {len(samples[0])} frames, and {c3d.name} needs {c3d.shortest}"
            print(f"{C3D_PROTOCOL.name} is left out: {needs}.", file=sys.stderr)
    elif c3d is not None:
        rows = features_of(c3d, C3D_PROTOCOL, samples, c3d.longest)
        metrics += score(c3d, rows, f"the first {c3d.longest} frames of samples before compression")
    return metrics
