"""Trains each variant of `configs/walt_trends.py` on one tokenizer and tells what each brings.

    python benchmarks/trends.py --workdir=runs/trends

The tokenizer is trained once, or taken from a run of `configs/walt_demo.py` with --tokenizer=WORKDIR. Variants have as
many steps as the base, and so as many tokens; "full_attention" has as many as take the time of the base's, by the ratio
of their steps measured in turn. What is done already is not done again. Leaves `trends.json` and `trends.md`.
"""

import argparse
import json
import pathlib
import runpy
import shutil

import numpy as np

from walt_jax.config import build
from walt_jax.evaluation.evaluate import evaluate
from walt_jax.training.benchmark import benchmark
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig
from walt_jax.workdir import write_atomically

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "walt_trends.py"
COLUMNS = ("trained_all_right", "held_out_all_right", "trained_colour_right", "trained_shape_right")


def main() -> None:
    """Trains and measures what is not done yet, and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", type=pathlib.Path, help="a trained run of configs/walt_demo.py")
    parser.add_argument("--steps", type=int, help="of the base, instead of the config's")
    parser.add_argument("--variants", nargs="*", help="these alone")
    flags = parser.parse_args()
    module = runpy.run_path(str(CONFIG))
    rows = []
    for variant in flags.variants or module["VARIANTS"]:
        folder = flags.workdir / variant
        if not (folder / "row.json").exists():
            knobs = module["get_config"](variant)
            if flags.steps:
                knobs.stages.denoiser.steps = flags.steps
            if variant == "full_attention":
                knobs.stages.denoiser.steps = round(knobs.stages.denoiser.steps * time_ratio(module))
            row = {"variant": variant, **run(build(RunConfig, knobs.to_dict(), "config"), folder, flags)}
            write_atomically(folder / "row.json", json.dumps(row, indent=1) + "\n")
        rows.append(json.loads((folder / "row.json").read_text()))
    write_atomically(flags.workdir / "trends.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(flags.workdir / "trends.md", table(rows))
    print(table(rows))


def time_ratio(module: dict) -> float:
    """The seconds of a base's step over those of a step with full attention, measured in turn."""
    timed = benchmark(build(RunConfig, module["get_config"]("base").to_dict(), "config"))
    seconds = {row["name"]: row["seconds_median"] for row in timed}
    return seconds["denoiser_train_step"] / seconds["denoiser_train_step_full_attention"]


def run(config: RunConfig, folder: pathlib.Path, flags: argparse.Namespace) -> dict:
    """Trains and measures one variant."""
    shared = flags.tokenizer or flags.workdir / "base"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints/tokenizer", "vocabulary.model"):
        source, copy = shared / name, folder / name
        if source.is_dir() and not copy.exists():
            shutil.copytree(source, copy)
        elif source.exists() and not copy.exists():
            shutil.copyfile(source, copy)
    run = Run(config, folder)
    run.keep_vocabulary(run.make_vocabulary())
    run.train()
    generator = run.generator()
    metrics = evaluate(folder, run.codec, generator.tokenizer, generator, run.unseen(), config.data, config.evaluation)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "denoiser"]
    return {
        "steps": lines[-1]["step"],
        "last_loss": float(np.mean([line["loss"] for line in lines[-10:]])),
        **{metric["name"]: metric["value"] for metric in metrics},
    }


def table(rows: list[dict]) -> str:
    heads = ["variant", "steps", "last loss", *(name.replace("_", " ") for name in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["variant"], f"{row['steps']:,}", f"{row['last_loss']:.4f}"]
        cells += [f"{row[name]:.0%}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
