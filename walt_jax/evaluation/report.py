"""Writes `report.html`: one page about a run, from the files that the workdir has so far."""

import base64
import html
import json
import operator
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Sequence

import numpy as np

from walt_jax.config import build
from walt_jax.data.video import ClipError, read_clip
from walt_jax.diffusion.schedule import Schedule
from walt_jax.errors import UserError
from walt_jax.evaluation.report_compare import compare_section, read_runs
from walt_jax.evaluation.report_curves import curve
from walt_jax.evaluation.report_files import (
    CLOCKS,
    FINAL,
    Stages,
    absent,
    duration,
    final_mean,
    number,
    read_json,
    read_stages,
    series,
    table,
    with_unit,
)
from walt_jax.evaluation.report_goodput import goodput_section
from walt_jax.evaluation.report_page import PAGE
from walt_jax.evaluation.report_previews import previews_section
from walt_jax.remote import resolved
from walt_jax.workdir import write_atomically

# Larger pages are slow to open and hard to mail; media beyond this are linked instead of embedded.
EMBEDDED_BYTES = 30 * 2**20

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".png": "image/png",
}

# (least, most) in CSS pixels: clips whose shorter side is below the first are enlarged by a whole factor, those wider
# than the second are shrunk.
GALLERY = (128, 320)
COMPACT = (96, 160)
STRIP = (96, 1100)  # of several clips next to each other

COMPARISONS = {"<": operator.lt, "≤": operator.le, ">": operator.gt, "≥": operator.ge}


def write_report(workdir: pathlib.Path, compare: Sequence[pathlib.Path] = ()) -> pathlib.Path:
    """Writes `workdir/report.html`, one file that can be moved or mailed; equal inputs give equal bytes.

    It shows what there is of `config.json`, `metrics.jsonl`, `clock.jsonl`, `evaluate.json`, `files.json`,
    `reconstructions.png`, `super_resolution.png`, `data.png`, `previews/`, and of `samples.json` and
    `contact_sheet.png` in `samples/`, and says what isn't there yet.
    A metric's `target` is a number, which is the least that will do, or a text such as "<= 12.5".

    Args:
        workdir: the run's folder.
        compare: folders of other runs, for a section that compares this one with them.

    Returns:
        The path of the report.

    Raises:
        UserError: if one of `compare` holds no run.
    """
    comparison = compare_section(read_runs([workdir, *compare])) if compare else ""
    media = _Media(workdir)
    evaluate, evaluate_note = read_json(workdir / "evaluate.json", dict)
    stages, metrics_note = read_stages(workdir / "metrics.jsonl")
    config, _ = read_json(workdir / "config.json", dict)
    files, _ = read_json(workdir / "files.json", dict)
    sections = {
        "Comparison": comparison,
        "Evaluation": evaluate_note + _evaluation(evaluate, workdir, media),
        "Super-resolution": _super_resolution(evaluate, workdir, media),
        "Samples": _gallery(workdir / "samples", media, _judged(evaluate)),
        "Reconstructions": _reconstructions(evaluate, workdir, media),
        "Data": _data(files, workdir, media),
        "Progress": previews_section(workdir, list(stages), lambda path: media.clip(path, STRIP)[0]),
        "Training": metrics_note + _training(stages) + _noise_schedule(config),
        "Time": goodput_section(workdir),
        "Configuration": _configuration(workdir / "config.json"),
    }
    samples = workdir / "samples" / "samples.json"
    if config.get("denoiser", "") is None and not samples.exists():
        del sections["Samples"]  # a tokenizer has none
    if not comparison:
        del sections["Comparison"]
    if not sections["Data"]:
        del sections["Data"]
    if not sections["Progress"]:
        del sections["Progress"]
    if not sections["Time"]:
        del sections["Time"]
    if not evaluate.get("super_resolution"):
        del sections["Super-resolution"]
    page = PAGE.substitute(
        title=html.escape(resolved(workdir).name),
        links="".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections),
        facts=_facts(evaluate, stages),
        sections="\n".join(f'<h2 id="{name.lower()}">{name}</h2>\n{body}' for name, body in sections.items()),
        footer=media.account(),
    )
    path = workdir / "report.html"
    write_atomically(path, page)
    return path


class _Media:
    """Shows media files of the workdir: embedded until `EMBEDDED_BYTES` are reached, then linked."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._embedded_bytes = 0
        self._linked = 0

    def clip(self, path: pathlib.Path, sizes: tuple[int, int]) -> tuple[str, int]:
        """(HTML of a clip that plays automatically, or of the reason why it can't be shown; its width in CSS pixels)"""
        least, most = sizes
        try:
            _, height, width, _ = read_clip(path, max_frames=1).shape
        except ClipError as error:
            reason = html.escape(f"{path.name} can't be shown: {error}.")
            return f'<div class="missing">{reason}</div>', least
        factor = max(1, -(-least // min(height, width)))
        shown_width = width * factor if factor > 1 else min(width, most)
        shown_height = round(height * shown_width / width)
        attributes = f'src="{self._source(path)}" width="{shown_width}" height="{shown_height}"'
        attributes += ' class="tiny"' if factor > 1 else ""
        if path.suffix.lower() == ".gif":
            return f'<img {attributes} alt="">', shown_width
        return f"<video {attributes} autoplay loop muted playsinline></video>", shown_width

    def sheet(self, path: pathlib.Path, folded: bool = False) -> str:
        """A picture, at most as wide as the page, or a note that it does not exist."""
        name = path.relative_to(self._workdir).as_posix()
        if not path.is_file() or not path.read_bytes():
            return absent(name)
        image = f'<img class="sheet" src="{self._source(path)}" alt="{name}">'
        return f"<details><summary>Contact sheet</summary>{image}</details>" if folded else image

    def account(self) -> str:
        """A sentence on whether the page can be moved without its folder."""
        if self._linked:
            return f"{self._linked} files did not fit into this page and are linked: it needs its folder next to it."
        return "This page is complete in itself: it can be moved or mailed."

    def _source(self, path: pathlib.Path) -> str:
        content = path.read_bytes()
        if self._embedded_bytes + len(content) > EMBEDDED_BYTES:
            self._linked += 1
            relative = pathlib.Path(os.path.relpath(path, self._workdir)).as_posix()
            return html.escape(urllib.parse.quote(relative))
        self._embedded_bytes += len(content)
        kind = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _facts(evaluate: dict, stages: Stages) -> str:
    """The most important numbers, for the head of the page."""
    facts = {}
    prompts = evaluate.get("prompts") or []
    if prompts:
        facts["Prompts right"] = f"{sum(map(_is_right, prompts))} of {len(prompts)}"
    verdicts = [_verdict(metric) for metric in evaluate.get("metrics") or []]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    if verdicts:
        facts["Targets met"] = f"{sum(verdicts)} of {len(verdicts)}"
    if stages:
        facts["Stages"] = str(len(stages))
        facts["Steps"] = f"{sum(max(rows) for rows in stages.values()):,}"
    seconds = [second for second in _stage_seconds(stages).values() if second]
    if seconds:
        facts["Training time"] = duration(sum(seconds))
    if not facts:
        return ""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{fact}</dd></div>" for name, fact in facts.items()) + "</dl>"


def _evaluation(evaluate: dict, workdir: pathlib.Path, media: _Media) -> str:
    """The metrics and the judged prompts."""
    metrics, prompts = evaluate.get("metrics") or [], evaluate.get("prompts") or []
    parts = []
    if metrics:
        head = ("metric", "#value", "#target", "", "protocol")
        parts.append(table(head, [_metric_row(metric) for metric in metrics]))
    if prompts:
        groups = {
            "Held-out combinations": [prompt for prompt in prompts if prompt.get("held_out")],
            "Trained combinations": [prompt for prompt in prompts if not prompt.get("held_out")],
        }
        groups = {name: group for name, group in groups.items() if group}
        parts.append("<h3>Prompts, by what a judge saw</h3>" + _score_table(groups))
        for name, group in groups.items():
            right = f"{sum(map(_is_right, group))} of {len(group)} right"
            cards = "".join(_prompt_card(prompt, workdir, media) for prompt in group)
            parts.append(f'<h3>{name}<small>{right}</small></h3><div class="clips">{cards}</div>')
    return "\n".join(parts)


def _super_resolution(evaluate: dict, workdir: pathlib.Path, media: _Media) -> str:
    """The sheet with low resolution, upscaled and original clips; a row for each clip."""
    return media.sheet(workdir / "super_resolution.png") + _clip_rows(evaluate.get("super_resolution") or [])


def _reconstructions(evaluate: dict, workdir: pathlib.Path, media: _Media) -> str:
    """The sheet; the rate-distortion plot; a row for each clip."""
    plot = media.sheet(workdir / "rate_distortion.png") if evaluate.get("rate_distortion") else ""
    return media.sheet(workdir / "reconstructions.png") + plot + _clip_rows(evaluate.get("reconstructions") or [])


def _clip_rows(rows: list[dict]) -> str:
    """A table of clips' metrics, folded."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "caption"]
    head = ("clip", *(f"#{html.escape(key.replace('_', ' '))}" for key in keys))
    cells = [[html.escape(str(row.get("caption") or "–")), *(number(row.get(key)) for key in keys)] for row in rows]
    return f"<details><summary>Each clip</summary>{table(head, cells)}</details>" if rows else ""


def _judged(evaluate: dict) -> set[str]:
    """Files shown with the judged prompts; the gallery leaves them out."""
    return {os.path.normpath(prompt.get("file") or "") for prompt in evaluate.get("prompts") or []}


def _metric_row(metric: dict) -> list[str]:
    unit = str(metric.get("unit") or "")
    value = html.escape(with_unit(metric.get("value"), unit))
    target = "" if metric.get("target") is None else html.escape(_target(metric["target"], unit))
    marks = {True: '<span class="good">✓ met</span>', False: '<span class="bad">✗ missed</span>', None: ""}
    name, protocol = (html.escape(str(metric.get(key) or "")) for key in ("name", "protocol"))
    return [name, value, target, marks[_verdict(metric)], protocol]


def _target(target: float | str, unit: str = "") -> str:
    if isinstance(target, str):
        return target.replace("<=", "≤").replace(">=", "≥").strip()
    return f"≥ {with_unit(target, unit)}" if unit == "fraction" else f"≥ {target:,}"


def _verdict(metric: dict) -> bool | None:
    """Whether the target is met; None without a target, or with one that can't be compared."""
    value, target = metric.get("value"), metric.get("target")
    if target is None or not isinstance(value, int | float):
        return None
    match = re.fullmatch(r"([<≤>≥])\s*(-?[\d,]*\.?\d+(?:e[-+]?\d+)?)", _target(target))
    return COMPARISONS[match[1]](value, float(match[2].replace(",", ""))) if match else None


def _is_right(prompt: dict) -> bool:
    return all((prompt.get("right") or {}).values())


def _score_table(groups: dict[str, list[dict]]) -> str:
    """A table: how many clips of each group have each attribute right, and all of them."""
    attributes = list(dict.fromkeys(name for group in groups.values() for p in group for name in p.get("right") or {}))
    rows = []
    for name, group in groups.items():
        verdicts = [[(p.get("right") or {}).get(attribute, True) for p in group] for attribute in attributes]
        counts = [sum(verdict) for verdict in [*verdicts, map(_is_right, group)]]
        rows.append([name, *(f"{count} of {len(group)}" for count in counts)])
    return table(("", *(f"#{html.escape(attribute)}" for attribute in attributes), "#all"), rows)


def _prompt_card(prompt: dict, workdir: pathlib.Path, media: _Media) -> str:
    if _is_right(prompt):
        return _card(prompt, workdir, media, COMPACT)
    seen = []
    for attribute, right in prompt["right"].items():
        value = html.escape(str(prompt.get(attribute) or f"no {attribute}"))
        seen.append(value if right else f'<span class="bad">{value}</span>')
    if not any(map(prompt.get, prompt["right"])):
        seen = ['<span class="bad">nothing clear</span>']
    return _card(prompt, workdir, media, COMPACT, f'<span class="bad">✗</span> saw {", ".join(seen)}')


def _card(entry: dict, folder: pathlib.Path, media: _Media, sizes: tuple[int, int], wrong: str = "") -> str:
    """A clip with its prompt and what is wrong with it."""
    clip, width = media.clip(folder / str(entry.get("file") or "no file"), sizes)
    prompt, seed = html.escape(str(entry.get("prompt") or "no prompt")), html.escape(str(entry.get("seed", "–")))
    asides = "".join(f'<span class="aside">{aside}</span>' for aside in (wrong, f"seed {seed}") if aside)
    kind = ' class="wrong"' if wrong else ""
    # As wide as the clip, so that a long prompt wraps; 8 pixels are the card's padding.
    return (
        f'<figure{kind} style="width: {width + 8}px">{clip}'
        f'<figcaption><span class="prompt" title="{prompt}">{prompt}</span>{asides}</figcaption></figure>\n'
    )


def _gallery(folder: pathlib.Path, media: _Media, shown: Iterable[str]) -> str:
    """The clips that a folder's samples.json lists, without those in `shown`, and the contact sheet."""
    samples, note = read_json(folder / "samples.json", list, f"{folder.name}/samples.json")
    samples = [s for s in samples if os.path.normpath(f"{folder.name}/{s.get('file')}") not in shown]
    cards = "".join(_card(sample, folder, media, GALLERY) for sample in samples)
    sheet = media.sheet(folder / "contact_sheet.png", folded=True)
    return note + (f'<div class="clips">{cards}</div>' if cards else "") + sheet


def _data(files: dict, workdir: pathlib.Path, media: _Media) -> str:
    """How many clips were read, which files were skipped and why; the sheet of `--mode=data`, with packs."""
    sheet = workdir / "data.png"
    return (_files(files) if files else "") + (media.sheet(sheet) if sheet.exists() else "")


def _files(files: dict) -> str:
    skipped = files.get("clips_skipped") or []
    rows = [[html.escape(str(row.get("file"))), html.escape(str(row.get("reason")))] for row in skipped]
    warnings = (files.get("training") or {}).get("warnings") or []
    parts = [f"<p>{number(files.get('clips_kept'))} clips kept, {len(skipped):,} files skipped.</p>"]
    parts += [f'<p class="bad">{html.escape(str(warning))}</p>' for warning in warnings]
    if rows:
        parts.append(f"<details><summary>Skipped files</summary>{table(('file', 'reason'), rows)}</details>")
    return "\n".join(parts)


def _training(stages: Stages) -> str:
    """A table with a row for each stage, then the curves of each stage."""
    if not stages:
        return ""
    seconds = _stage_seconds(stages)
    rows, curves = [], []
    for stage, steps in stages.items():
        name = html.escape(stage)
        final = number(final_mean(series(steps, "loss")[1]))
        rows.append([name, f"{max(steps):,}", final, duration(seconds[stage])])
        keys = [
            key for key in dict.fromkeys(key for row in steps.values() for key in row) if not key.startswith(CLOCKS)
        ]
        keys.sort(key=lambda key: key != "loss")
        modules = [key for key in keys if "/" in key]
        figures, folded = (
            "\n".join(_figure(key, *series(steps, key)) for key in some)
            for some in ([key for key in keys if key not in modules], modules)
        )
        curves.append(f'<h3>{name}</h3>\n<div class="curves">{figures}</div>')
        if modules:
            summary = "<summary>Norms of gradients and updates, by module</summary>"
            curves.append(f'<details>{summary}<div class="curves">{folded}</div></details>')
    note = f'<p class="note">Final values are means over the last {FINAL:.0%} of what was logged.</p>'
    return "\n".join([table(("stage", "#steps", "#final loss", "#time"), rows), note, *curves])


def _noise_schedule(config: dict) -> str:
    """The logarithm of signal over noise, α²/σ², by diffusion time; nothing where the config has no denoiser."""
    if not config.get("denoiser"):
        return ""
    try:
        schedule = build(Schedule, config["diffusion"]["schedule"], "config.diffusion.schedule")
    except (KeyError, TypeError, UserError):
        return ""
    thousandths = np.arange(1, 1000)
    alpha, sigma = (np.asarray(x, np.float64) for x in schedule(np.float32(thousandths / 1000)))
    drawn = curve("log_snr", thousandths, 2 * np.log(alpha / sigma), large=False)
    caption = f"<figcaption><b>log SNR, by time in thousandths</b><span>{schedule.name}</span></figcaption>"
    return f'\n<h3>noise schedule</h3>\n<div class="curves"><figure>{caption}{drawn}</figure></div>'


def _figure(key: str, steps: np.ndarray, values: np.ndarray) -> str:
    """A curve with its caption; the loss is larger than the others."""
    if not len(values):
        return ""
    large = key == "loss"
    kind = ' class="large"' if large else ""
    caption = f"<b>{html.escape(key.replace('_', ' '))}</b><span>{number(final_mean(values))}</span>"
    return f"<figure{kind}><figcaption>{caption}</figcaption>{curve(key, steps, values, large)}</figure>"


def _stage_seconds(stages: Stages) -> dict[str, float | None]:
    """Seconds that each stage took. The clock may restart with a stage or a resume, or run on."""
    seconds, clock = {}, 0.0
    for stage, steps in stages.items():
        _, elapsed = series(steps, "elapsed_seconds")
        seconds[stage] = 0.0 if len(elapsed) else None
        for now in elapsed:
            seconds[stage] += now - clock if now >= clock else now
            clock = now
    return seconds


def _configuration(path: pathlib.Path) -> str:
    config, note = read_json(path, dict)
    if note:
        return note
    knobs = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<details><summary>Every knob of this run</summary><pre>{knobs}</pre></details>"
