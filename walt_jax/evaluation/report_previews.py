"""The report's section on what each stage had learned at some of its steps: one video of several clips for each."""

import html
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from walt_jax.evaluation.report_files import read_json

FOLDER = "previews"  # in the workdir: STAGE/STEP.mp4, and STAGE.json
SHOWN = 10  # steps of a stage, the last one among them


def steps_of(folder: pathlib.Path) -> list[int]:
    """The steps of a stage that there are videos of."""
    if not folder.is_dir():
        return []
    return sorted(int(path.stem) for path in folder.iterdir() if path.suffix == ".mp4" and path.stem.isdigit())


def previews_section(workdir: pathlib.Path, stages: Sequence[str], clip: Callable[[pathlib.Path], str]) -> str:
    """HTML of each stage's videos, early steps first.

    Args:
        workdir: the run's folder.
        stages: in their order.
        clip: HTML of a video that plays.
    """
    parts = []
    for stage in stages:
        folder = workdir / FOLDER / stage
        steps = steps_of(folder)
        if not steps:
            continue
        about, _ = read_json(folder.with_name(f"{stage}.json"), dict)
        some = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, min(SHOWN, len(steps))).round().astype(int)})
        captions = " · ".join(html.escape(str(caption)) for caption in about.get("captions") or [] if caption)
        note = html.escape(str(about.get("what") or ""))
        parts.append(f'<h3>{html.escape(stage)}<small>{note}</small></h3><p class="note">{captions}</p>')
        figures = (
            f"<figure>{clip(folder / f'{step}.mp4')}<figcaption>step {step:,}</figcaption></figure>" for step in some
        )
        parts.append(f'<div class="clips steps">{"".join(figures)}</div>')
    return "\n".join(parts)
