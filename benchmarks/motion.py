"""Interpolation between a first and a last picture with and without motion, on the trained demo; and moved latents.

    python benchmarks/motion.py --workdir=runs/demo --out=docs/generation

Writes `motion.png` and `motion.json`: for each strength of `--motion` the share of drawn clips in which colour, shape
and direction are right, the error against the drawn frames between, and how far the shape's path is from a straight
line. Then, how well a clip is decoded whose latents were moved instead of its pixels.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import numpy as np
from PIL import Image
from scipy.ndimage import shift

import walt_jax
from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import compare_sheet
from walt_jax.evaluation.judge import judge
from walt_jax.evaluation.reconstruction import psnr_db
from walt_jax.evaluation.video_quality import smoothness
from walt_jax.generation.asking import Ask, Condition, encoded, resolve
from walt_jax.generation.motion import between
from walt_jax.generation.request import Request

SIZE, FRAMES, FPS = 32, 17, 8.0
SHOWN = (0.0, 0.4, 0.8)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--out", default="docs/generation", type=pathlib.Path)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = walt_jax.load(arguments.workdir).generator
    generator = dataclasses.replace(generator, config=dataclasses.replace(generator.config, steps=arguments.steps))
    rng = np.random.default_rng(0)
    chosen = [COMBINATIONS[i] for i in rng.choice(len(COMBINATIONS), arguments.clips, replace=False)]
    clips = [draw(one, np.random.default_rng(number), FRAMES, SIZE) for number, one in enumerate(chosen)]
    rows, shown = [], [[(one.caption, [("drawn", clip)]) for one, clip in zip(chosen, clips, strict=True)]]

    def measured(name: str, made: list, **more) -> None:
        rows.append(
            {"name": name, **more, "clips": len(made), "steps": arguments.steps, **compared(made, clips, chosen)}
        )
        print(json.dumps(rows[-1]), flush=True)
        if more.get("strength", 0.0) in SHOWN:
            shown.append([(name, clip) for clip in made])

    measured("tokenizer alone", decoded(generator, clips))
    measured("motion alone", [np.stack([clip[0], *between(clip[0], clip[-1], FRAMES - 2), clip[-1]]) for clip in clips])
    for strength in STRENGTHS:
        requests = []
        for number, (clip, one) in enumerate(zip(clips, chosen, strict=True)):
            with tempfile.TemporaryDirectory() as folder:
                files = [f"{folder}/first.png", f"{folder}/last.png"]
                Image.fromarray(clip[0]).save(files[0])
                Image.fromarray(clip[-1]).save(files[1])
                given = [Condition(files[0]), Condition(files[1], -1)]
                asked = resolve(generator, Ask(FPS, given, motion=strength), (FRAMES, SIZE, SIZE))
            requests.append(Request(one.caption, number, "", asked.size, asked.given))
        measured(f"strength {strength:g}", generator.generate(requests, bar=True), strength=strength)
    rows += [moved(generator, clips, pixels) for pixels in range(1, 9)]
    for row in rows[-8:]:
        print(json.dumps(row))
    titles = [title for title, _ in shown[0][:3]]
    blocks = [(title, [("drawn", clips[n]), *(those[n] for those in shown[2:])]) for n, title in enumerate(titles)]
    sheet = compare_sheet(blocks, frames_per_clip=9).convert("RGB").quantize(64, dither=0)
    sheet.save(arguments.out / "motion.png", optimize=True)
    (arguments.out / "motion.json").write_text(json.dumps(rows, indent=1) + "\n")


def decoded(generator, clips: list) -> list:
    """Clips encoded and decoded."""
    return generator.decode([encoded(generator.model.codec, generator.tokenizer, clip) for clip in clips])


def compared(made: list, clips: list, wanted: list) -> dict:
    """Judged scores; PSNR of frames 1 to 12, of which nothing is given, against the drawn ones; smoothness."""
    right = [all(judge(clip).right(one).values()) for clip, one in zip(made, wanted, strict=True)]
    return {
        "all_right": float(np.mean(right)),
        "between_psnr_db": float(np.mean([psnr_db(a[1:13], b[1:13]) for a, b in zip(clips, made, strict=True)])),
        "smoothness": float(np.mean([smoothness(clip) for clip in made])),
        "off_line_pixels": float(np.mean([off_line(clip) for clip in made])),
    }


def off_line(clip: np.ndarray) -> float:
    """Root mean square distance of the shape's centre from motion at constant speed, in pixels."""
    weight = clip.max(-1).astype(np.float64)
    weight = np.where(weight > 64, weight, 0)
    total = np.maximum(weight.sum((1, 2)), 1)
    axis = np.arange(clip.shape[1])
    path = np.stack([(weight.sum(2) @ axis) / total, (weight.sum(1) @ axis) / total], axis=1)
    time = np.arange(len(clip))
    fitted = np.stack([np.polyval(np.polyfit(time, column, 1), time) for column in path.T], axis=1)
    return float(np.sqrt(np.square(path - fitted).sum(1).mean()))


def moved(generator, clips: list, pixels: int) -> dict:
    """Decoded latents that are moved to the right, against the tokenizer on pixels that are, away from the edges."""
    stride = generator.model.codec.tokenizer.config.strides[2]
    clips = [clip[:, :, : SIZE - pixels] for clip in clips[:16]]
    by_pixels = [np.pad(clip, ((0, 0), (0, 0), (pixels, 0), (0, 0))) for clip in clips]
    whole = [np.pad(clip, ((0, 0), (0, 0), (0, pixels), (0, 0))) for clip in clips]
    latents = [encoded(generator.model.codec, generator.tokenizer, clip) for clip in whole]
    moved = [shift(one, (0, 0, pixels / stride, 0), order=1, mode="nearest") for one in latents]
    errors = []
    for made in (generator.decode(moved), decoded(generator, by_pixels)):
        errors.append(
            np.mean([psnr_db(a[:, :, pixels:], b[:, :, pixels:]) for a, b in zip(by_pixels, made, strict=True)])
        )
    return {
        "name": f"moved by {pixels} pixels",
        "moved_latents_psnr_db": float(errors[0]),
        "moved_pixels_psnr_db": float(errors[1]),
    }


if __name__ == "__main__":
    main()
