"""What the parts of the report share: reading a workdir's files, and cells of tables."""

import html
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

FINAL = 0.05  # of what was logged, of which final values are means

CLOCKS = ("elapsed_seconds", "clock_")  # what begins so has no curve: the section on time has the sums

Stages = dict[str, dict[int, dict[str, float]]]


def holds_run(workdir: pathlib.Path) -> bool:
    """Whether a workdir has anything to report."""
    return any((workdir / name).exists() for name in ("config.json", "metrics.jsonl", "evaluate.json"))


def series(steps: dict[int, dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which `key` was logged, and its finite values."""
    points = [(step, row[key]) for step, row in sorted(steps.items()) if math.isfinite(row.get(key, math.nan))]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def final_mean(values: np.ndarray) -> float | None:
    """The mean of the last ones."""
    return float(values[-max(1, round(FINAL * len(values))) :].mean()) if len(values) else None


def read_json(path: pathlib.Path, kind: type, name: str = "") -> tuple[Any, str]:
    """(content, ""), or (an empty `kind`, a note on why the file can't be used)."""
    name = name or path.name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return kind(), absent(name)
    except ValueError:  # not JSON, or not UTF-8
        value = None
    if not isinstance(value, kind):
        return kind(), absent(name, "isn't complete yet")
    return value, ""


def read_stages(path: pathlib.Path) -> tuple[Stages, str]:
    """The numbers of each logged step of each stage, and a note on what can't be read."""
    if not path.is_file():
        return {}, absent(path.name)
    stages, unreadable = {}, 0
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            stage, step = str(row["stage"]), int(row["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        numbers = {key: value for key, value in row.items() if type(value) in (int, float) and key != "step"}
        stages.setdefault(stage, {}).setdefault(step, {}).update(numbers)
    note = "" if stages else absent(path.name, "holds no step yet")
    if unreadable:
        note += absent(path.name, f"has {unreadable} line{'s' * (unreadable > 1)} that can't be read")
    return stages, note


def absent(name: str, what: str = "isn't there yet") -> str:
    """A note on a file."""
    return f'<p class="absent"><code>{html.escape(name)}</code> {what}.</p>\n'


def table(head: Iterable[str], rows: Iterable[list[str]], names: Sequence[str] = ()) -> str:
    """A table of HTML cells; the columns whose head starts with # are numbers. Columns without content are left out.

    Args:
        head: of each column, also its cells' class.
        rows: of cells.
        names: more heads, of columns of numbers that have no class of their own.
    """
    head, rows = [*head, *(f"#{name}" for name in names)], list(rows)
    columns = [i for i, name in enumerate(head) if any(row[i] for row in rows)]
    kinds = [' class="number"' if name.startswith("#") else f' class="{name}"' if name else "" for name in head]
    cells = "".join(f"<th{kinds[i]}>{head[i].removeprefix('#')}</th>" for i in columns)
    lines = ["".join(f"<td{kinds[i]}>{row[i]}</td>" for i in columns) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table></div>'


def number(value: Any) -> str:
    """Four digits, or all of a whole number."""
    if value is None:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"


def with_unit(value: Any, unit: str) -> str:
    """A number and its unit; a fraction in percent."""
    if unit == "fraction" and isinstance(value, int | float):
        return f"{100 * value:.4g} %"
    return f"{number(value)} {unit}".strip()


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
