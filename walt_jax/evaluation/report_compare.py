"""The report's comparison with other runs: losses by stage, metrics, goodput, and the differences of their configs.

Numbers of a metric stand in one row only where name, unit and protocol are the same; other protocols have other rows.
"""

import html
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from walt_jax import remote
from walt_jax.clock import CLOCK, PARTS, account, read_clock
from walt_jax.errors import UserError
from walt_jax.evaluation.report_curves import Line, curves
from walt_jax.evaluation.report_files import (
    CLOCKS,
    Stages,
    duration,
    final_mean,
    holds_run,
    number,
    read_json,
    read_stages,
    series,
    table,
    with_unit,
)
from walt_jax.workdir import flatten

# Of the runs' lines, in order, on light and on dark paper; the first is the report's own run.
COLOURS = ("#3b7dc4", "#d0653b", "#3f9464", "#9a6fc0", "#b8912a", "#3aa0a8", "#c2577f", "#8b8f96")
# A result that is part of a protocol's text; it differs between runs measured in the same way.
RESULT = re.compile(r"; lowest [^;]*, highest [^;]*")
QUALITY = ("loss", "psnr", "ssim", "accuracy", "perplexity", "usage", "fvd", "fid")  # other curves are folded
GROUP = 12  # knobs that a run lacks together have a row each; more have one row
# What a metric has beside its value that must be equal for numbers to be comparable.
COMPARABLE = ("name", "unit", "protocol", "count", "detector_sha256", "reference_sha256")


class RunFiles(NamedTuple):
    """What a workdir has.

    Attributes:
        name: as the report shows it.
        colour: of its lines.
        stages: see `read_stages`.
        metrics: of `evaluate.json`.
        config: its knobs.
        path: the workdir.
    """

    name: str
    colour: str
    stages: Stages
    metrics: list[dict[str, Any]]
    config: dict[str, Any]
    path: pathlib.Path


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[RunFiles]:
    """The runs of a comparison, the report's own first.

    Raises:
        UserError: if a folder holds no run, or is there twice, or there are too many.
    """
    resolved = [remote.resolved(path) for path in workdirs]
    for path, place in zip(workdirs, resolved, strict=True):
        if not holds_run(path):
            raise UserError(f"--compare={path} holds no run; name a workdir that --mode=train has written.")
        if resolved.count(place) > 1:
            raise UserError(f"{path} is named twice; --compare=RUN takes other runs than --workdir's, each once.")
    if len(workdirs) > len(COLOURS):
        raise UserError(f"{len(workdirs)} runs are too many for one report; compare at most {len(COLOURS)}.")
    found = []
    for name, colour, path in zip(_names(resolved), COLOURS, workdirs, strict=False):
        stages, _ = read_stages(path / "metrics.jsonl")
        evaluate, _ = read_json(path / "evaluate.json", dict)
        config, _ = read_json(path / "config.json", dict)
        found.append(RunFiles(name, colour, stages, evaluate.get("metrics") or [], config, path))
    return found


def compare_section(runs: Sequence[RunFiles]) -> str:
    """HTML: the legend, then curves, metrics, time and differences of the runs."""
    keys = "".join(f'<span><i style="background: {run.colour}"></i>{html.escape(run.name)}</span>' for run in runs)
    parts = [f'<div class="legend">{keys}</div>', _losses(runs), _metrics(runs), _time(runs), _differences(runs)]
    return "\n".join(part for part in parts if part)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _losses(runs: Sequence[RunFiles]) -> str:
    """A row of the final losses, then for each stage the curves of what several runs have logged."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    if not stages:
        return ""
    rows, figures = [], []
    for stage in stages:
        own = [(run, run.stages[stage]) for run in runs if stage in run.stages]
        for run, steps in own:
            row = [html.escape(stage), _named(run), f"{max(steps):,}", number(final_mean(series(steps, "loss")[1]))]
            rows.append(row)
        keys = dict.fromkeys(key for _, steps in own for row in steps.values() for key in row)
        keys = sorted(
            (key for key in keys if "/" not in key and not key.startswith(CLOCKS)), key=lambda key: key != "loss"
        )
        plots = {key: _plot(key, own) for key in keys}
        shown, folded = (
            "".join(plot for key, plot in plots.items() if any(word in key for word in QUALITY) == first)
            for first in (True, False)
        )
        figures.append(f'<h4>{html.escape(stage)}</h4><div class="curves">{shown}</div>')
        if folded:
            summary = "<summary>Speed, norms and others</summary>"
            figures.append(f'<details>{summary}<div class="curves">{folded}</div></details>')
    head = ("stage", "run", "#steps", "#final loss")
    return "<h3>Losses by stage</h3>" + table(head, rows) + "\n".join(figures)


def _plot(key: str, own: Sequence[tuple[RunFiles, dict[int, dict[str, float]]]]) -> str:
    """A figure of what several runs have logged, or of a loss."""
    lines = [Line(*series(steps, key), run.colour) for run, steps in own]
    lines = [line for line in lines if len(line.values)]
    if not lines or (len(lines) == 1 and key != "loss"):
        return ""
    kind = ' class="large"' if key == "loss" else ""
    caption = f"<figcaption><b>{html.escape(key.replace('_', ' '))}</b></figcaption>"
    return f"<figure{kind}>{caption}{curves(key, lines, key == 'loss')}</figure>"


def _metrics(runs: Sequence[RunFiles]) -> str:
    """A row for each metric and protocol, a column for each run."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for metric in run.metrics:
            key = tuple(RESULT.sub("", str(metric.get(part) or "")) for part in COMPARABLE)
            rows.setdefault(key, {})[run.name] = metric.get("value")
    if not rows:
        return ""
    # Rows of a metric next to each other, in order of its first one.
    names = list(dict.fromkeys(name for name, *_ in rows))
    cells, before = [], None
    for (name, unit, protocol, *others), values in sorted(rows.items(), key=lambda row: names.index(row[0][0])):
        more = "; ".join(f"{part}: {text:.16}" for part, text in zip(COMPARABLE[3:], others, strict=True) if text)
        texts = [with_unit(values[run.name], unit) if run.name in values else "–" for run in runs]
        another = '<span class="bad">another protocol:</span> ' if name == before else ""
        described = another + html.escape("; ".join(filter(None, (protocol, more))))
        cells.append([html.escape(name), *map(html.escape, texts), described])
        before = name
    head = ("metric", *(f"#{html.escape(run.name)}" for run in runs), "protocol")
    note = "Numbers of different protocols, counts or detectors are not comparable and have rows of their own."
    note = f'<p class="note">{note}</p>'
    return "<h3>Metrics</h3>" + table(head, cells) + note


def _time(runs: Sequence[RunFiles]) -> str:
    """Goodput and where each run's time went."""
    totals = [(run, account(read_clock(run.path / CLOCK))) for run in runs]
    totals = [(run, total) for run, total in totals if total.attempts]
    if not totals:
        return ""
    shown = [part for part in PARTS if any(total.seconds()[part] > 0 for _, total in totals)]
    rows = []
    for run, total in totals:
        seconds = total.seconds()
        parts = [duration(seconds[part]) for part in shown]
        rows.append(
            [_named(run), f"{total.goodput():.1%}", f"{len(total.attempts)}", duration(sum(seconds.values())), *parts]
        )
    head = ("run", "#goodput", "#attempts", "#all", *(f"#{part.replace('_', ' ')}" for part in shown))
    return "<h3>Time</h3>" + table(head, rows)


def _differences(runs: Sequence[RunFiles]) -> str:
    """The knobs in which the runs' configs differ."""
    runs = [run for run in runs if run.config]
    if len(runs) < 2:
        return ""
    flat = [flatten(run.config) for run in runs]
    absent = object()
    rows = []
    groups: list[str] = []
    for knob in dict.fromkeys(knob for knobs in flat for knob in knobs):
        group = _missing_group(knob, [run.config for run in runs])
        counts = [sum(name.startswith(f"{group}.") for name in knobs) for knobs in flat]
        if group and max(counts) > GROUP:
            # All knobs of a stage, say, that a run does not have: one row in place of one for each.
            if group not in groups:
                groups.append(group)
                rows.append([f"<code>{html.escape(group)}</code>", *(f"{n} knobs" if n else "–" for n in counts)])
            continue
        values = [knobs.get(knob, absent) for knobs in flat]
        if any(value != values[0] for value in values):
            shown = ["–" if value is absent else f"<code>{html.escape(_short(value))}</code>" for value in values]
            rows.append([f"<code>{html.escape(knob)}</code>", *shown])
    if not rows:
        return "<h3>Configuration</h3><p>The configs are equal.</p>"
    return "<h3>Configuration</h3>" + table(("knob",), rows, [html.escape(run.name) for run in runs])


def _missing_group(knob: str, configs: Sequence[dict[str, Any]]) -> str | None:
    """The outermost group of knobs that this one is in and that some configs lack, or have no value of."""
    names = knob.split(".")
    for depth in range(1, len(names)):
        found: list[Any] = list(configs)
        for name in names[:depth]:
            found = [each.get(name) if isinstance(each, dict) else None for each in found]
        if not all(isinstance(each, dict) for each in found):
            return ".".join(names[:depth])
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _named(run: RunFiles) -> str:
    return f'<span class="run"><i style="background: {run.colour}"></i>{html.escape(run.name)}</span>'
