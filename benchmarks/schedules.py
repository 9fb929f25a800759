"""Schedules of long videos on the demo trained on frames with gaps, `configs/walt_demo_long.py`.

    python benchmarks/schedules.py --workdir=runs/demo_long --out=docs/generation

Writes `long_schedules.json` and `long_schedules.png`: for each schedule, which all start from the prompt alone, the
share of 65-frame videos with colour, shape and direction right, how far the shape's centre is from motion at constant
speed, how far it travels in frame sides (drawn clips: 0.25 to 0.5), and seconds a video.
"""

import argparse
import json
import pathlib
import time

import numpy as np
from motion import off_line

import walt_jax
from walt_jax.data.drawn import COMBINATIONS
from walt_jax.data.media import compare_sheet
from walt_jax.evaluation.judge import judge
from walt_jax.generation.request import Request

NAMES = ("autoreg", "long-range", "hierarchy-2", "hierarchy-3", "adaptive-autoreg", "adaptive-hierarchy-2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo_long")
    parser.add_argument("--out", default="docs/generation", type=pathlib.Path)
    parser.add_argument("--videos", type=int, default=24)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = walt_jax.load(arguments.workdir).generator
    chosen = np.random.default_rng(0).choice(len(COMBINATIONS), arguments.videos, replace=False)
    wanted = [COMBINATIONS[one] for one in chosen]
    requests = [Request(one.caption, number) for number, one in enumerate(wanted)]
    rows, shown = [], []
    for name in NAMES:
        start = time.monotonic()
        made = generator.following(name).generate(requests, bar=False)
        seconds = (time.monotonic() - start) / len(made)
        rows.append({"schedule": name, "videos": len(made), "seconds_per_video": seconds, **measured(made, wanted)})
        print(json.dumps(rows[-1]), flush=True)
        shown.append(made)
        (arguments.out / "long_schedules.json").write_text(json.dumps(rows, indent=1) + "\n")
    blocks = [
        (wanted[number].caption, list(zip(NAMES, (made[number] for made in shown), strict=True))) for number in (0, 1)
    ]
    sheet = compare_sheet(blocks, frames_per_clip=9, scale=2)
    sheet.convert("RGB").quantize(64, dither=0).save(arguments.out / "long_schedules.png", optimize=True)


def measured(made: list, wanted: list) -> dict:
    """Means over videos."""
    right = [judge(clip).right(one) for clip, one in zip(made, wanted, strict=True)]
    found = {f"{name}_right": float(np.mean([one[name] for one in right])) for name in right[0]}
    return found | {
        "all_right": float(np.mean([all(one.values()) for one in right])),
        "off_line_pixels": float(np.mean([off_line(clip) for clip in made])),
        "travel": float(np.mean([travel(clip) for clip in made])),
    }


def travel(clip: np.ndarray) -> float:
    """How far the bright pixels' centre is at the end from where it began, in frame sides."""
    centres = []
    for frame in (clip[0], clip[-1]):
        y, x = np.nonzero(frame.max(-1) > 64)
        centres.append(np.array([y.mean(), x.mean()]) if len(y) else np.zeros(2))
    return float(np.linalg.norm(centres[1] - centres[0]) / clip.shape[1])


if __name__ == "__main__":
    main()
