"""Computes the metrics of a run, each with its protocol, and draws the pictures that go with them."""

import json
import pathlib

import numpy as np
from PIL import Image

from walt_jax.data.drawn import COMBINATIONS
from walt_jax.data.media import compare_sheet
from walt_jax.data.pipeline import DataConfig, Source
from walt_jax.data.video import read_clip
from walt_jax.evaluation import drawn_score
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.noise_levels import loss_by_noise
from walt_jax.evaluation.rate_distortion import h264_points, plot
from walt_jax.evaluation.reconstruction import (
    Clip,
    in_batches,
    measure,
    psnr_db,
    rate_distortion,
    reconstruction_sheet,
    usable_clips,
)
from walt_jax.evaluation.reconstruction_distances import reconstruction_distances
from walt_jax.evaluation.sample_scores import sample_scores
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.low_res import shrunk
from walt_jax.generation.request import Request
from walt_jax.generation.sample import write_samples
from walt_jax.parallel.processes import is_first
from walt_jax.tokenizer.perceptual import load_features
from walt_jax.workdir import write_atomically, write_picture

SHEET_CLIPS = 8
RATE_CLIPS = 16


def evaluate(
    workdir: pathlib.Path,
    codec: Codec,
    tokenizer: TrainedTokenizer,
    generator: Generator | None,
    unseen: Source,
    data: DataConfig,
    config: EvaluationConfig,
) -> list[dict]:
    """Reconstructs unseen clips and samples videos, and measures both.

    Samples of the drawn captions are judged. For super-resolution, unseen clips are shrunk and upscaled instead.
    Writes `evaluate.json`, `reconstructions.png`, `rate_distortion.png` and, with a generator, `samples/` into the
    workdir; for super-resolution also `super_resolution.png`.

    Args:
        workdir: the run's folder.
        codec, tokenizer: the trained tokenizer.
        generator: the trained generator, or None for a run that trains only a tokenizer.
        unseen: clips that were not trained on.
        data: size, length and frame rate of the clips.
        config: see `EvaluationConfig`.

    Returns:
        The metrics: {"name", "value", "unit", "protocol"} each, with "target" where there is one.
    """
    clips, captions = usable_clips(unseen, range(len(unseen)), config.clips, config.seed)
    report = _reconstruction(workdir, codec, tokenizer, clips, captions, data, config)
    metrics = report["metrics"]
    if generator is not None:
        metrics += loss_by_noise(generator, np.stack(clips), captions, config.seed)
    if generator is not None and generator.low_res is not None:
        clips, captions = clips[: config.prompts], captions[: config.prompts]
        scores, report["super_resolution"] = _super_resolution(workdir, generator, clips, captions, data)
        metrics += scores
    elif generator is not None:
        captions = [c.caption for c in COMBINATIONS] if data.source == "drawn" else _distinct(unseen, config.prompts)
        prompts = [caption for caption in captions for _ in range(config.samples_per_prompt)]
        seeds = [seed for _ in captions for seed in range(config.samples_per_prompt)]
        sampled = generator.generate([Request(*one) for one in zip(prompts, seeds, strict=True)])
        rows = write_samples(workdir / "samples", sampled, prompts, seeds, data.fps)
        metrics += sample_scores(sampled, prompts, config.weights)
        if data.source == "drawn" and is_first():
            combinations = [c for c in COMBINATIONS for _ in range(config.samples_per_prompt)]
            files = [f"samples/{row['file']}" for row in rows]
            # The compressed files are judged, not the arrays: they are what users see.
            seen = [read_clip(workdir / file) for file in files]
            scores, report["prompts"] = drawn_score.score(seen, combinations, seeds, files)
            metrics += scores
    write_atomically(workdir / "evaluate.json", json.dumps(report, indent=1) + "\n")
    return metrics


def _distinct(source: Source, count: int) -> list[str]:
    return list(dict.fromkeys(source.captions))[:count]


def _super_resolution(
    workdir: pathlib.Path, generator: Generator, clips: list[Clip], captions: list[str], data: DataConfig
) -> tuple[list[dict], list[dict]]:
    """Shrinks clips, upscales them with their captions, and compares the results with the clips.

    Returns:
        (metrics, rows): over all clips, and for each clip {"caption", "psnr_db", "low_res_psnr_db", "bicubic_psnr_db"}.
    """
    scale, seeds = generator.low_res.scale, list(range(len(clips)))
    latents = np.stack(in_batches(generator.low_res.encode, clips))
    requests = [Request(*one, low_res=small) for *one, small in zip(captions, seeds, latents, strict=True)]
    upscaled = generator.generate(requests)
    write_samples(workdir / "samples", upscaled, captions, seeds, data.fps)
    rows, shown = [], []
    for clip, sample, caption in zip(clips, upscaled, captions, strict=True):
        small = shrunk(clip, scale)
        row = {
            "caption": caption,
            "psnr_db": psnr_db(clip, sample),
            "low_res_psnr_db": psnr_db(small, shrunk(sample, scale)),
            "bicubic_psnr_db": psnr_db(clip, enlarged(small, scale)),
        }
        rows.append(row)
        title = f"{caption} ({row['psnr_db']:.1f} dB)".strip()
        large = small.repeat(scale, axis=1).repeat(scale, axis=2)
        shown.append((title, [("low resolution", large), ("upscaled", sample), ("original", clip)]))
    write_picture(workdir / "super_resolution.png", compare_sheet(shown[:SHEET_CLIPS]))
    explained = {
        "psnr_db": "upscaled clips against the originals",
        "low_res_psnr_db": "upscaled clips, shrunk again, against the shrunk originals",
        "bicubic_psnr_db": "for comparison: shrunk originals, enlarged by bicubic interpolation, against the originals",
    }
    where = f"PSNR (8-bit RGB, peak 255), mean over {len(clips)} unseen clips, seeds 0 to {len(clips) - 1}"
    metrics = [
        {
            "name": f"super_resolution_{key}",
            "value": float(np.mean([row[key] for row in rows])),
            "unit": "dB",
            "protocol": f"{what}, {scale}× along height and width; {where}",
        }
        for key, what in explained.items()
    ]
    return metrics, rows


def enlarged(clip: Clip, scale: int) -> Clip:
    """Frames enlarged by bicubic interpolation."""
    size = (clip.shape[2] * scale, clip.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip])


def _reconstruction(
    workdir: pathlib.Path,
    codec: Codec,
    tokenizer: TrainedTokenizer,
    clips: list[Clip],
    captions: list[str],
    data: DataConfig,
    config: EvaluationConfig,
) -> dict:
    """{"metrics", "reconstructions", "rate_distortion"}: means of all clips, a row for each, the plot's points."""
    features = load_features(config.perceptual_weights) if config.perceptual_weights else None
    reconstructions, rows, codes = measure(codec, tokenizer, clips, captions, features)
    shown = np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).astype(int)
    sheet = reconstruction_sheet(*([values[i] for i in shown] for values in (clips, reconstructions, captions)))
    write_picture(workdir / "reconstructions.png", sheet)
    some = clips[:RATE_CLIPS]
    points = rate_distortion(codec, tokenizer, some) + h264_points(some, data.fps)
    write_picture(workdir / "rate_distortion.png", plot(points))

    where = f"{len(clips)} unseen clips of {data.frames} × {data.height} × {data.width} pixels from {data.source}"
    protocols = {
        "psnr_db": ("reconstruction_psnr_db", "dB", "PSNR (8-bit RGB, peak 255, one mean squared error a clip)"),
        "ssim": (
            "reconstruction_ssim",
            "",
            "SSIM (Wang et al. 2004: 8-bit RGB, Gaussian window, σ 1.5), its frames' mean",
        ),
        "lpips": ("reconstruction_lpips", "", "LPIPS (VGG, version 0.1), its frames' mean"),
        "bits_per_pixel": ("bits_per_pixel", "", "codes, each of log2(number of codes) bits, per pixel and frame"),
    }
    metrics = []
    for key, (name, unit, what) in protocols.items():
        values = [row[key] for row in rows if key in row]
        if values:
            spread = f"lowest {min(values):.4g}, highest {max(values):.4g}"
            protocol = f"mean over {where}, of each clip's {what}; {spread}"
            metrics.append({"name": name, "value": float(np.mean(values)), "unit": unit, "protocol": protocol})
    if data.source == "drawn":
        metrics[0]["target"] = 30.0
    explained = {
        "code_usage": "number of distinct codes, over the number of possible codes, or of positions if that is smaller",
        "code_perplexity": "exp of the entropy of the codes' frequencies",
    }
    metrics += [
        {"name": name, "value": codes[name], "unit": "", "protocol": f"{what}; {where}"}
        for name, what in explained.items()
        if name in codes
    ]
    metrics += reconstruction_distances(clips, reconstructions, config.distances, config.weights, where)
    return {"metrics": metrics, "reconstructions": rows, "rate_distortion": points}
