"""The model card of an export: only what the run's own files say."""

import json
import pathlib
from typing import Any

from walt_jax.remote import resolved
from walt_jax.training.checkpoint import saved_steps
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig

READERS = {
    "safetensors": "`walt_jax.load(FOLDER)`, or the files with `safetensors`; names are paths, joined by `/`.",
    "orbax": "`walt_jax.load(FOLDER)`; or without walt_jax the arrays, with "
    "`orbax.checkpoint.StandardCheckpointer().restore(FOLDER/params)`.",
    "stablehlo": "the programs with `jax.export.deserialize` and the parameters with `safetensors`, without walt_jax: "
    "`programs.json` says what each takes; or `walt_jax.load(FOLDER)`.",
    "diffusers": "`from_pretrained` of the class that each folder's `config.json` names.",
}


def card(run: Run, kind: str, count: int) -> str:
    """The README.md of an export.

    Args:
        run: what is exported.
        kind: the format.
        count: number of parameters.
    """
    config, workdir = run.config, run.workdir
    lines = [
        *_front_matter(config),
        "",
        f"# {resolved(workdir).name}",
        "",
        _what(config, count),
        "",
        "## Training data",
        "",
    ]
    data = config.data
    files = _read(workdir / "files.json")
    lines.append(
        f"Clips of `{data.source}`, {data.frames} frames of {data.height} × {data.width} pixels at {data.fps:g} frames "
        "a second."
    )
    if files:
        kept, skipped = files["clips_kept"], len(files["clips_skipped"])
        lines[-1] += f" {kept:,} clips were kept, held-out ones among them; {skipped:,} files were skipped."
    lines += ["", "## Training", "", "| stage | trains | steps done | of | batch |", "|---|---|---|---|---|"]
    for name in config.trained_stages:
        stage = config.stages[name]
        unit, done = "packs" if stage.pack else "clips", max(saved_steps(workdir, name), default=0)
        lines.append(f"| {name} | {stage.task} | {done:,} | {stage.steps:,} | {stage.batch_size} {unit} |")
    if config.tokenizer_from:
        lines += ["", f"The tokenizer is that of `{config.tokenizer_from}`."]
    lines += ["", "## Metrics", ""]
    metrics = (_read(workdir / "evaluate.json") or {}).get("metrics", [])
    if metrics:
        lines += ["| metric | value | protocol |", "|---|---|---|"]
        lines += [f"| {m['name']} | {m['value']:.4g} {m['unit']} | {_cell(m['protocol'])} |" for m in metrics]
    else:
        lines.append("Not measured.")
    lines += ["", "## How to load", "", f"As {kind}: {READERS[kind]}", "", "## Limits", "", _limits(config)]
    return "\n".join(lines) + "\n"


def _front_matter(config: RunConfig) -> list[str]:
    video, denoiser = config.data.frames > 1, config.denoiser
    tags = ["walt_jax", "jax", "video" if video else "image"]
    tags += ["tokenizer"] if denoiser is None else ["diffusion", denoiser.block]
    lines = ["---", "library_name: walt_jax", "license: apache-2.0"]
    if config.text is not None:
        lines.append(f"pipeline_tag: {'text-to-video' if video else 'text-to-image'}")
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---"]


def _what(config: RunConfig, count: int) -> str:
    strides = " × ".join(map(str, config.tokenizer.strides))
    tokenizer = f"a tokenizer with strides of {strides} and {config.tokenizer.latent_channels} latent channels"
    if config.denoiser is None:
        return f"{tokenizer.capitalize()}: {count:,} parameters."
    condition = (
        "text" if config.text else f"{config.denoiser.classes} classes" if config.denoiser.classes else "nothing"
    )
    return (
        f"A latent diffusion model ({config.denoiser.block}, {config.denoiser.layers} layers of width "
        f"{config.denoiser.dim}), conditioned on {condition}, with {tokenizer}: {count:,} parameters."
    )


def _limits(config: RunConfig) -> str:
    data = config.data
    made = "Reconstructs" if config.denoiser is None else "Generates"
    limits = f"{made} what resembles its training data. It was trained on {data.frames} × {data.height} × {data.width}."
    if config.text is not None:
        limits += f" Of a caption the first {config.text.length - 1} tokens are read."
    if config.pretrained_text is not None:
        limits += " The published T5 that reads captions is not part of this export."
    return limits + " The licence is that of walt_jax; the training data may have one of its own."


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _cell(text: str) -> str:
    """Text in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
