"""What a stage measures every few steps, with the parameters that it serves, on clips that it is not trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from walt_jax.data.pipeline import Source
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.distances import Reference, choose, compare
from walt_jax.evaluation.features import features_of
from walt_jax.evaluation.noise_levels import level_names, noise_losses
from walt_jax.evaluation.reconstruction import measure, usable_clips
from walt_jax.evaluation.reconstruction_distances import cut_of, measured_frames, reconstruction_distances
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Request

PREFIX = "validation_"  # of the names in metrics.jsonl

# Of what a stage serves: (values by their name, the protocol of each).
Validation = Callable[[Any], tuple[dict[str, float], dict[str, str]]]


def of_tokenizer(
    codec: Codec, trained: Callable[[Any], TrainedTokenizer], unseen: Source, images: bool, config: EvaluationConfig
) -> Validation:
    """Reconstructions: PSNR, SSIM and the config's distances.

    Args:
        codec: the stage's tokenizer.
        trained: its parameters, of what the stage serves.
        unseen: clips that are not trained on.
        images: whether the stage's tokenizer is one of images: first frames are measured.
        config: see `EvaluationConfig`.
    """
    clips, captions = usable_clips(unseen, range(len(unseen)), config.validation_clips, config.seed)
    clips = [clip[:1] for clip in clips] if images else clips
    where = f"{len(clips)} unseen clips"

    def validate(served: Any) -> tuple[dict[str, float], dict[str, str]]:
        reconstructions, rows, _ = measure(codec, trained(served), clips, captions)
        found = [
            {
                "name": name,
                "value": float(np.mean([row[name] for row in rows])),
                "protocol": f"mean over reconstructions of {where}",
            }
            for name in ("psnr_db", "ssim")
            if name in rows[0]
        ]
        found += reconstruction_distances(clips, reconstructions, config.distances, config.weights, where)
        return _named(found)

    return validate


def of_denoiser(generator: Callable[[Any], Generator], unseen: Source, config: EvaluationConfig) -> Validation:
    """The loss, whole and by noise level; and the config's distances, where samples are asked for.

    Args:
        generator: has the parameters that the stage serves.
        unseen: clips that are not trained on, in the shape that is sampled.
        config: see `EvaluationConfig`.
    """
    found, captions = usable_clips(unseen, range(len(unseen)), config.validation_clips, config.seed)
    clips = np.stack(found)
    known: list[Any] = []  # detectors, protocols and real features, once they are needed

    def distances(with_params: Generator) -> list[dict[str, Any]]:
        frames = clips.shape[1]
        if not known:
            for detector, protocol in choose(config.distances, config.weights, images=frames == 1, stand_in=True):
                if detector.refusal(measured_frames(protocol, frames)):
                    continue  # a stage on images, of a run whose clips are long enough
                real = features_of(detector, protocol, clips, measured_frames(protocol, frames))
                known.append((detector, protocol, Reference.of(real, detector, protocol)))
        samples = with_params.generate(_requests(unseen.captions, config.validation_samples), bar=False)
        metrics = []
        for detector, protocol, reference in known:
            measured = measured_frames(protocol, frames)
            features = features_of(detector, protocol, samples, measured)
            cut = f"samples against unseen clips, {cut_of(protocol, measured, frames)}"
            metrics += compare(detector, protocol, features, reference, cut, "samples")
        return metrics

    def validate(served: Any) -> tuple[dict[str, float], dict[str, str]]:
        with_params = generator(served)
        losses, protocol = noise_losses(with_params, clips, captions, config.seed)
        found = [{"name": "loss", "value": float(losses.total.sum() / losses.count.sum()), "protocol": protocol}]
        found += [
            {"name": f"loss_{name}", "value": float(total / count), "protocol": protocol}
            for name, total, count in zip(level_names(), losses.total, losses.count, strict=True)
            if count
        ]
        if config.validation_samples and config.distances and with_params.low_res is None and len(clips) > 1:
            found += distances(with_params)
        return _named(found)

    return validate


def _requests(captions: Sequence[str], count: int) -> list[Request]:
    """So many, each caption in turn; always the same."""
    distinct = list(dict.fromkeys(captions)) or [""]
    return [Request(distinct[number % len(distinct)], number) for number in range(count)]


def _named(metrics: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    return (
        {PREFIX + metric["name"]: metric["value"] for metric in metrics},
        {PREFIX + metric["name"]: metric["protocol"] for metric in metrics},
    )
