"""Measures a run by a paper's protocol: samples or reconstructions against real clips; resumable."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from walt_jax.data.media import write_video
from walt_jax.data.pipeline import DataConfig, Mixture
from walt_jax.data.shapes import ClipShape
from walt_jax.errors import UserError
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.distances import choose, compare
from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol
from walt_jax.evaluation.features import Detector, FeatureCache, digest_of, features_of
from walt_jax.evaluation.paper_protocols import PaperProtocol
from walt_jax.evaluation.real_clips import RealClips, reference_of, shrunk_to
from walt_jax.evaluation.reconstruction import in_batches
from walt_jax.generation import conditions
from walt_jax.generation.asking import encoded
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Given, Request
from walt_jax.parallel.processes import is_first, together
from walt_jax.text.labels import Labels
from walt_jax.workdir import write_atomically

FOLDER = "protocols"  # in the workdir
REFERENCES = "references"
SHOWN = 16  # samples that are written as videos
AT_ONCE = 4  # batches of samples, whose features are then computed and written

Measured = list[tuple[Detector, FeatureProtocol, FeatureCache]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A trained run that is measured by a protocol.

    Attributes:
        paper: the protocol.
        workdir: the run's.
        identity: tells the trained models from others; features of samples are kept under it.
        codec, tokenizer: of the run.
        generator: None where the run trains only a tokenizer.
        data: of the run.
        source: the clips of a split in a shape.
        config: see `EvaluationConfig`.
    """

    paper: PaperProtocol
    workdir: pathlib.Path
    identity: str
    codec: Codec
    tokenizer: TrainedTokenizer
    generator: Generator | None
    data: DataConfig
    source: Callable[[str, tuple[ClipShape, ...]], Mixture]
    config: EvaluationConfig

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the run's clips."""
        return self.data.frames, self.data.height, self.data.width

    @property
    def samples(self) -> int:
        """In each fold."""
        return self.config.protocol_samples or self.paper.samples

    @property
    def folds(self) -> int:
        return 1 if self.config.protocol_samples else self.paper.folds

    @property
    def made(self) -> str:
        """What is measured, in a word."""
        return "reconstructions" if self.paper.kind == "reconstruction" else "samples"

    def check(self) -> None:
        """
        Raises:
            UserError: if the run can't be measured so.
        """
        paper, generator = self.paper, self.generator
        where = f"The protocol {paper.name}"
        if paper.kind == "reconstruction":
            return
        if generator is None:
            raise UserError(f"{where} samples videos, and this run trains only a tokenizer; rfvd_ucf measures those.")
        if generator.low_res is not None:
            raise UserError(f"{where} samples videos, and this run upscales clips; measure the base run.")
        if paper.observed and not generator.model.denoiser.config.frame_prediction:
            raise UserError(f"{where} predicts frames, and this run's denoiser was not trained to; name another.")
        if paper.observed >= self.data.frames:
            raise UserError(
                f"{where} observes {paper.observed} frames, and the run's clips have {self.data.frames}; name another."
            )

    def differences(self, real: int) -> list[str]:
        """What is not as in the paper, a phrase each.

        Args:
            real: how many real clips there are.
        """
        paper, found = self.paper, []
        if self.size != paper.clip:
            mine, theirs = (" × ".join(map(str, size)) for size in (self.size, paper.clip))
            found.append(f"clips of {mine}, the protocol's have {theirs}")
        if (self.samples, self.folds) != (paper.samples, paper.folds):
            found.append(f"{self.folds} × {self.samples} samples, the protocol has {paper.folds} × {paper.samples}")
        if paper.real is not None and real != paper.real:
            found.append(f"{real} real clips, the protocol has {paper.real}")
        if paper.kind != "reconstruction":
            sampling = self.generator.config
            if paper.steps is not None and sampling.steps != paper.steps:
                found.append(f"{sampling.steps} sampling steps, the paper has {paper.steps}")
            if paper.guidance is not None and sampling.guidance.scale != paper.guidance:
                found.append(f"guidance {sampling.guidance.scale:g}, the paper has {paper.guidance:g}")
        return found


def measure_protocol(run: Measurement) -> list[dict[str, Any]]:
    """Measures a run by a protocol. A stopped command resumes: what was sampled is not sampled again.

    Features of samples are kept in `protocols/NAME/` of the workdir, and the first samples as videos; statistics of
    real clips in `references/`, or the config's folder of them.

    Returns:
        As `distances.compare`, a metric with "folds" where there are several. Names are "ucf101_walt_fvd_tf1" and so
        on, and "like_ucf101_walt_fvd_tf1" where something is not as in the paper; "differences" and "open" say what.

    Raises:
        UserError: if the run can't be measured so, or real clips can't be read.
    """
    run.check()
    paper, config = run.paper, run.config
    source = run.source(paper.split, (ClipShape(*run.size),))
    count = paper.real or paper.windows * len(source)
    if config.protocol_samples:
        count = min(count, config.protocol_samples)
    real = RealClips(source, count, config.seed)
    total = run.samples * run.folds
    folder = run.workdir / FOLDER / paper.name
    references = pathlib.Path(config.references) if config.references else run.workdir / REFERENCES
    frames = min(paper.frames, run.data.frames)
    measured: Measured = []
    for detector, protocol in choose(paper.distances, config.weights, images=False, stand_in=True):
        if not protocol.of_images and (refusal := detector.refusal(frames)):
            raise UserError(f"Clips of the protocol {paper.name}: {refusal}; measure a run of longer clips.")
        measured.append((detector, protocol, FeatureCache(folder / protocol.name)))
    found = []
    known = [
        reference_of(real, detector, protocol, frames, paper.measured, references, f"real clips for {paper.name}")
        for detector, protocol, _ in measured
    ]
    key = _Keys(run, real.digest(), frames)
    _fill(run, real, measured, key, range(total), frames, folder)
    for (detector, protocol, cache), (reference, digest) in zip(measured, known, strict=True):
        differences = run.differences(count)
        if protocol.name not in paper.distances:
            differences.append("a stand-in network, because there are no weights of the protocol's")
        rows = np.stack([cache.rows[each] for n in range(total) for each in key.of(n, detector, protocol)])
        stated = {
            "frames": frames,
            "paper": paper.paper,
            "open": paper.open,
            "differences": differences,
            "reference_digest": digest,
        }
        cut = f"the first {frames} of {run.data.frames} frames" if frames < run.data.frames else f"all {frames} frames"
        cut += f"; real clips of {run.data.source}, {paper.split} split"
        if paper.measured:
            cut += f", all shrunk to {paper.measured[0]} × {paper.measured[1]} pixels"
        folds = [
            compare(detector, protocol, part, reference, cut, run.made, **stated) for part in np.split(rows, run.folds)
        ]
        found += [_over(list(each), paper, differences) for each in zip(*folds, strict=True)]
    return found


class _Keys:
    """Names the features of samples in the cache: by the models, the sampling, the number."""

    def __init__(self, run: Measurement, real: str, frames: int):
        sampling = "" if run.paper.kind == "reconstruction" else repr(run.generator.config)
        made_of = "" if run.paper.kind == "class" else real
        self._run = [run.identity, run.paper.name, sampling, made_of, str(frames), str(run.config.seed)]
        self._frames = frames

    def of(self, number: int, detector: Detector, protocol: FeatureProtocol) -> list[str]:
        """Of a sample: one, or of images one for each frame."""
        key = digest_of(*self._run, detector.sha256, protocol.name, str(number))
        return protocol.keys(key, self._frames)


def _fill(
    run: Measurement,
    real: RealClips,
    measured: Measured,
    key: _Keys,
    numbers: range,
    frames: int,
    folder: pathlib.Path,
) -> None:
    """Samples what is missing in the caches, and enters its features."""
    missing = [
        number
        for number in numbers
        if any(each not in cache.rows for d, p, cache in measured for each in key.of(number, d, p))
    ]
    size = AT_ONCE * (8 if run.generator is None else run.generator.config.batch_size)
    with tqdm.tqdm(
        desc=f"{run.made} for {run.paper.name}",
        total=len(numbers),
        initial=len(numbers) - len(missing),
        unit="clip",
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not is_first() or not missing,
    ) as bar:
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            clips = _made(run, real, some)
            for number, clip in zip(some, clips, strict=True):
                if number < SHOWN and is_first() and len(clip) > 1:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_video(folder / f"{number:06d}.mp4", clip, run.data.fps)
            shrunk = [shrunk_to(clip[:frames], run.paper.measured) for clip in clips]
            for detector, protocol, cache in measured:
                keys = [each for number in some for each in key.of(number, detector, protocol)]
                for name, row in zip(keys, features_of(detector, protocol, shrunk), strict=True):
                    cache.put(name, row)
                cache.keep()
            bar.update(len(some))


def _made(run: Measurement, real: RealClips, numbers: Sequence[int]) -> list[Clip]:
    """The samples or reconstructions of these numbers; a sample depends on its number alone."""
    paper = run.paper
    if paper.kind == "class":
        known = run.generator.captions
        captions = list(known.names) if isinstance(known, Labels) else sorted(set(real.source.captions))
        captions = captions or [""]
        requests = [Request(captions[number % len(captions)], number) for number in numbers]
        return run.generator.generate(requests, bar=False)
    originals = [_usable(real, number) for number in numbers]
    if paper.kind == "reconstruction":
        latents = in_batches(lambda video: together(run.codec.encode, run.tokenizer, video)[0], originals)
        return in_batches(lambda latents: together(run.codec.decode, run.tokenizer, latents)[0], latents)
    stride = run.codec.tokenizer.config.strides
    requests = []
    for number, clip in zip(numbers, originals, strict=True):
        canvas = conditions.place([conditions.Media(clip[: paper.observed])], run.size, stride[0])
        latents = encoded(run.codec, run.tokenizer, canvas.video)
        requests.append(Request("", number, given=Given(latents, conditions.until(canvas.strength, stride))))
    return run.generator.generate(requests, bar=False)


def _usable(real: RealClips, number: int) -> Clip:
    """The real clip of a number, or the next one that can be used."""
    for step in range(real.count):
        clip = real.clip((number + step) % real.count)
        if clip is not None:
            return clip
    raise UserError("No real clip can be read any more; --mode=data says why.")


def _over(folds: list[dict[str, Any]], paper: PaperProtocol, differences: Sequence[str]) -> dict[str, Any]:
    """One metric of those of all folds."""
    metric = dict(folds[0])
    metric["name"] = f"{'like_' if differences else ''}{paper.name}_{metric['name']}"
    if len(folds) > 1:
        values = [fold["value"] for fold in folds]
        metric["value"] = float(np.mean(values))
        metric["folds"] = {
            "count": len(folds),
            "mean": float(np.mean(values)),
            "standard_deviation": float(np.std(values)),
            "values": values,
        }
        metric["protocol"] = f"mean of {len(folds)} disjoint folds, each: {metric['protocol']}"
    metric["protocol"] += f". As {paper.paper}. {paper.open}"
    if differences:
        metric["protocol"] += f". Not as in the paper: {'; '.join(differences)}"
    return metric


def merge_into_report(path: pathlib.Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Adds metrics to an `evaluate.json`, in place of those of the same names; other parts of it stay."""
    try:
        report = json.loads(path.read_text())
        before = report["metrics"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        report, before = {}, []
    names = {metric["name"] for metric in metrics}
    report["metrics"] = [metric for metric in before if metric.get("name") not in names] + list(metrics)
    write_atomically(path, json.dumps(report, indent=1) + "\n")
