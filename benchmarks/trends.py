"""Trains each variant of a config on one tokenizer and compares them.

    python benchmarks/trends.py --tokenizer=runs/demo --workdir=runs/trends
    python benchmarks/trends.py --tokenizer=runs/demo --config=configs/demo_siblings.py --workdir=runs/siblings

The tokenizer is that of a run of `configs/walt_demo.py`; clips are encoded once for all variants that read the same.
Variants have as many steps as the first, and so as many tokens; those in the config's `EQUAL_TIME` have as many steps
as take the first one's time, by the ratio of their step times, measured interleaved. Finished variants are not trained
again. Leaves `trends.json` and `trends.md`.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.config import build
from walt_jax.diffusion.parameterization import clean
from walt_jax.evaluation.evaluate import evaluate
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import single_clips
from walt_jax.parallel.cost import flops
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig, make_task
from walt_jax.training.state import TrainState, make_train_step
from walt_jax.workdir import write_atomically

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
COLUMNS = ("trained_all_right", "held_out_all_right", "trained_colour_right", "trained_shape_right")
ROUNDS, UNSEEN = 8, 72
LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of noise over signal


def main() -> None:
    """Trains and measures what is not done yet, and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path, help="a trained run of configs/walt_demo.py")
    parser.add_argument("--config", type=pathlib.Path, default=CONFIGS / "walt_trends.py")
    parser.add_argument("--steps", type=int, help="of the first, instead of the config's")
    parser.add_argument("--clips", type=int, help="that are encoded, instead of the config's")
    parser.add_argument("--variants", nargs="*", help="only these")
    flags = parser.parse_args()
    module = runpy.run_path(str(flags.config))
    first, *_ = module["VARIANTS"]

    def config_of(variant: str) -> RunConfig:
        knobs = module["get_config"](variant)
        knobs.tokenizer_from = str(flags.tokenizer)
        stage = knobs.stages.denoiser
        stage.steps = flags.steps or stage.steps
        stage.cached_clips = flags.clips or stage.cached_clips
        if stage.pack is None and knobs.normalise_latents:
            stage.latents = str(flags.workdir / "latents")
        return build(RunConfig, json.loads(json.dumps(knobs.to_dict())), "config")

    encoder = Run(config_of(first), flags.workdir / "encoder")
    encoder.encode(flags.workdir / "latents", encoder.tokenizer(), encoder.config.stages["denoiser"].cached_clips)

    rows = []
    for variant in flags.variants or module["VARIANTS"]:
        folder, config = flags.workdir / variant, config_of(variant)
        if not (folder / "row.json").exists():
            ratio = 1.0
            if variant in module["EQUAL_TIME"]:
                ratio = time_ratio(config_of(first), config)
            row = {"variant": variant, "step_seconds_over_firsts": ratio, **run(config, ratio, folder)}
            write_atomically(folder / "row.json", json.dumps(row, indent=1) + "\n")
        rows.append(json.loads((folder / "row.json").read_text()))
    write_atomically(flags.workdir / "trends.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(flags.workdir / "trends.md", table(rows))
    print(table(rows))


def time_ratio(first: RunConfig, config: RunConfig) -> float:
    """The seconds of a step of `config` over those of `first`, measured interleaved; the clips are noise."""
    steps = [train_step(each)[0] for each in (first, config)]
    for step in steps:
        step()
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for step in steps:
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def train_step(config: RunConfig) -> tuple[Callable[[], Any], int, int]:
    """A train step on equal clips, the parameters that it trains, and its operations."""
    stage, task = config.stages["denoiser"], make_task(config, "denoiser", config.most_pieces)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    boxed, moving = task.init(key)
    params = jax.tree.map(lambda leaf: leaf.unbox(), boxed, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    optimizer = make_optimizer(stage.optimizer, stage.steps, jax.eval_shape(task.init, key)[0])
    shape = config.tokenizer.latent_shape(*config.clip_shape().nominal)
    latents = rng.normal(size=(stage.batch_size, *shape)).astype(np.float32)
    batch = {"latents": latents, "text": np.ones((stage.batch_size, config.text_length), np.int32)}
    state = [jax.jit(lambda params: TrainState.create(params, moving, task, optimizer, stage.ema_decay))(params)]
    update = make_train_step(task, optimizer, stage.ema_decay)
    size = sum(leaf.size for leaf in jax.tree.leaves(params["denoiser"]))
    cost = flops(task.gradients, params, moving, None, batch, key, np.int32(0))

    def step() -> None:
        state[0], metrics = update(state[0], None, batch, key)
        jax.block_until_ready(metrics)

    return step, size, cost


def run(config: RunConfig, ratio: float, folder: pathlib.Path) -> dict:
    """Trains and measures one variant."""
    stage = config.stages["denoiser"]
    stage = dataclasses.replace(stage, steps=round(stage.steps / ratio))
    config = dataclasses.replace(config, stages={**config.stages, "denoiser": stage})
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder)
    run.text.keep(run.make_vocabulary())
    run.train()
    generator = run.generator()
    metrics = evaluate(
        folder, run.codec, generator.tokenizer, generator, run.data.unseen(), config.data, config.evaluation
    )
    error = denoising_error(run, generator)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _, size, cost = train_step(config) if stage.pack is None else (None, None, None)
    steps, seconds = lines[-1]["step"], lines[-1]["elapsed_seconds"]
    tokens = stage.batch_size * (stage.pack.tokens if stage.pack else math.prod(generator.model.layout.grid))
    return {
        "parameters": size,
        "train_flops_per_step": cost,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": steps * tokens / seconds,
        "denoising_error": error,
        "last_loss": float(np.mean([line["loss"] for line in lines[-10:]])),
        **{metric["name"]: metric["value"] for metric in metrics},
    }


def denoising_error(run: Run, generator: Generator) -> float:
    """How far the estimate of clean latents is off, over their variance; of unseen clips, at noise of several levels.

    Unlike the loss it means the same whatever is predicted and at whatever times was trained. The noise is so much of a
    clip's latents' own deviation, which normalised latents and others have alike.
    """
    model, source = generator.model, run.data.unseen()
    clips = [source.sample(i, np.random.default_rng([i])) for i in range(min(UNSEEN, len(source)))]
    latents = np.concatenate([run.codec.encode(generator.tokenizer, clip["video"][None])[0] for clip in clips])
    scale, kind = np.std(latents), model.diffusion.parameterization
    text_tokens = generator.captions.encode([clip["caption"] for clip in clips])
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    x, noise = model.tokens(latents), model.tokens(noise)

    @jax.jit
    def estimate(level):
        # z / α = x + level · scale · ε, at the schedule's time for that ratio
        alpha = 1 / jnp.sqrt(1 + (level * scale) ** 2)
        sigma = level * scale * alpha
        time = jnp.full((len(x), 1), model.diffusion.schedule.time_of(alpha[None])[0])
        z = alpha * x + sigma * noise
        denoise = model.denoise(
            generator.params, model.condition(generator.params, single_clips(text_tokens)), model.layout
        )
        first = clean(kind, denoise(z, time, jnp.zeros_like(x)), z, alpha, sigma)
        return clean(kind, denoise(z, time, first), z, alpha, sigma) if model.diffusion.self_conditioning else first

    errors = [float(np.mean(np.square(estimate(jnp.float32(level)) - x))) for level in LEVELS]
    return float(np.mean(errors) / scale**2)


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    heads = [
        "variant",
        "parameters",
        "GFLOPs a step",
        "steps",
        "time a step",
        "tokens a second",
        "loss",
        "denoising error",
        *(name.replace("_", " ") for name in COLUMNS),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        size = f"{row['parameters'] / 1e6:.2f}M" if row["parameters"] else ""
        cost = f"{row['train_flops_per_step'] / 1e9:.1f}" if row["train_flops_per_step"] else ""
        cells = [row["variant"], size, cost, f"{row['steps']:,}", f"{row['step_seconds_over_firsts']:.2f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['last_loss']:.3f}", f"{row['denoising_error']:.4f}"]
        cells += [f"{row[name]:.0%}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
