"""Every metric of a run, each with its protocol, in `evaluate.json`; and what people look at beside it."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from walt_jax.config import Positive
from walt_jax.data.drawn import COMBINATIONS
from walt_jax.data.pipeline import DataConfig, Source
from walt_jax.data.video import read_clip
from walt_jax.evaluation import drawn_score
from walt_jax.evaluation.reconstruction import psnr_db, reconstruct_all, reconstruction_sheet
from walt_jax.generation.sample import Generator, write_samples
from walt_jax.workdir import write_atomically

SHEET_CLIPS = 8


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on.

    Attributes:
        clips: at most this many unseen clips are reconstructed, a random window and crop of each.
        samples_per_prompt: of the drawn grammar's 72 prompts, or of a folder's held-out captions.
        prompts: of a folder, at most this many captions are sampled.
        seed: of the unseen clips; samples have seeds 0, 1, ….
    """

    clips: Positive
    samples_per_prompt: Positive
    prompts: Positive = 16
    seed: int = 1234


def evaluate(
    workdir: pathlib.Path, generator: Generator, unseen: Source, data: DataConfig, config: EvaluationConfig
) -> list[dict]:
    """Measures reconstruction and, on drawn clips, the score of samples.

    Leaves `evaluate.json`, `reconstructions.png` and `samples/` in the workdir.

    Args:
        workdir: the run's folder.
        generator: what has been trained.
        unseen: clips that were not trained on.
        data: what the clips are made into.
        config: see `EvaluationConfig`.

    Returns:
        The metrics: {"name", "value", "unit", "protocol"} each, with "target" where there is one.
    """
    metrics = [_reconstruction(workdir, generator, unseen, data, config)]
    captions = [c.caption for c in COMBINATIONS] if data.source == "drawn" else _distinct(unseen, config.prompts)
    prompts = [caption for caption in captions for _ in range(config.samples_per_prompt)]
    seeds = [seed for _ in captions for seed in range(config.samples_per_prompt)]
    clips = generator.generate(prompts, seeds)
    rows = write_samples(workdir / "samples", clips, prompts, seeds, data.fps)
    report: dict = {"metrics": metrics}
    if data.source == "drawn":
        combinations = [c for c in COMBINATIONS for _ in range(config.samples_per_prompt)]
        files = [f"samples/{row['file']}" for row in rows]
        # The files, not the arrays: what others see is what is judged.
        seen = [read_clip(workdir / file) for file in files]
        scores, report["prompts"] = drawn_score.score(seen, combinations, seeds, files)
        metrics += scores
    write_atomically(workdir / "evaluate.json", json.dumps(report, indent=1) + "\n")
    return metrics


def _distinct(source: Source, count: int) -> list[str]:
    return list(dict.fromkeys(source.captions))[:count]


def _reconstruction(
    workdir: pathlib.Path, generator: Generator, source: Source, data: DataConfig, config: EvaluationConfig
) -> dict:
    clips, titles = [], []
    for index in range(min(config.clips, len(source))):
        clip = source.sample(index, np.random.default_rng([config.seed, index]))
        if clip is not None:
            clips.append(clip["video"])
            titles.append(clip["caption"])
    reconstruct = functools.partial(jax.jit(generator.model.reconstruct), generator.tokenizer)
    reconstructions = reconstruct_all(clips, reconstruct)
    shown = np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).astype(int)
    sheet = reconstruction_sheet(*([values[i] for i in shown] for values in (clips, reconstructions, titles)))
    sheet.save(workdir / "reconstructions.png")
    values = [psnr_db(*pair) for pair in zip(clips, reconstructions, strict=True)]
    metric = {
        "name": "reconstruction_psnr_db",
        "value": float(np.mean(values)),
        "unit": "dB",
        "protocol": (
            f"mean over {len(clips)} unseen clips of {data.frames} × {data.height} × {data.width} pixels from "
            f"{data.source}, of each clip's PSNR (8-bit RGB, peak 255, one mean squared error a clip); "
            f"lowest {min(values):.1f}, highest {max(values):.1f}"
        ),
    }
    return {**metric, "target": 30.0} if data.source == "drawn" else metric
