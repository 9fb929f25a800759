"""What the loss's terms of motion do: the demo's denoiser, trained for a few hundred steps with each of them.

    python benchmarks/motion_terms.py --workdir=runs/demo --out=docs/generation

Trains from fresh parameters, on the demo's tokenizer, always with the same seed, data and steps; then samples the
demo's 72 prompts. Writes `motion_terms.json`: the share of samples with colour, shape and direction right, VBench's
flicker and smoothness, and how far the shape's centre is from motion at constant speed; for drawn clips, too.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from motion import off_line

import walt_jax
from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.evaluation.judge import judge
from walt_jax.evaluation.video_quality import flicker, smoothness
from walt_jax.generation.request import Request

TERMS = {"none": {}, "consistency 1": {"consistency": 1.0}, "smoothness 1": {"smoothness": 1.0}}
TERMS |= {"both 0.5": {"consistency": 0.5, "smoothness": 0.5}}
SIZE, FRAMES = 32, 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--runs", default="runs/motion_terms", type=pathlib.Path, help="where the runs are kept")
    parser.add_argument("--out", default="docs/generation", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=2048, help="encoded clips to train on")
    parser.add_argument("--samples", type=int, default=2, help="of each prompt")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [one for one in COMBINATIONS for _ in range(arguments.samples)]
    drawn = [draw(one, np.random.default_rng(number), FRAMES, SIZE) for number, one in enumerate(wanted)]
    rows = [{"terms": "drawn clips", **measured(drawn, wanted)}]
    print(json.dumps(rows[0]), flush=True)
    for name, weights in TERMS.items():
        run = arguments.runs / name.replace(" ", "_")
        train(run, arguments, weights)
        requests = [Request(one.caption, number) for number, one in enumerate(wanted)]
        made = walt_jax.load(run).generator.generate(requests, bar=False)
        loss = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["loss"]
        rows.append({"terms": name, "steps": arguments.steps, "last_loss": loss, **measured(made, wanted)})
        print(json.dumps(rows[-1]), flush=True)
    (arguments.out / "motion_terms.json").write_text(json.dumps(rows, indent=1) + "\n")


def train(run: pathlib.Path, arguments: argparse.Namespace, weights: dict[str, float]) -> None:
    """Trains a run, or goes on with one that was stopped."""
    stage = {"steps": arguments.steps, "cached_clips": arguments.clips, "preview_every": 10_000}
    stage |= {f"motion.{name}": weight for name, weight in weights.items()}
    knobs = {f"stages.denoiser.{name}": value for name, value in stage.items()}
    knobs |= {"tokenizer_from": arguments.workdir, "evaluation.clips": 8, "evaluation.samples_per_prompt": 1}
    flags = [f"--config.{name}={value}" for name, value in knobs.items()]
    command = ["-m", "walt_jax.main", "--config=configs/walt_demo.py", f"--workdir={run}", *flags]
    subprocess.run([sys.executable, *command], check=True)


def measured(made: list, wanted: list) -> dict:
    """Means over videos."""
    right = [judge(clip).right(one) for clip, one in zip(made, wanted, strict=True)]
    found = {f"{name}_right": float(np.mean([one[name] for one in right])) for name in right[0]}
    return found | {
        "all_right": float(np.mean([all(one.values()) for one in right])),
        "flicker": float(np.mean([flicker(clip) for clip in made])),
        "smoothness": float(np.mean([smoothness(clip) for clip in made])),
        "off_line_pixels": float(np.mean([off_line(clip) for clip in made])),
        "videos": len(made),
    }


if __name__ == "__main__":
    main()
