"""Where a run's time goes, over all of its attempts: `clock.jsonl`, which is only appended to, and what it adds up to.

A row ends a stretch of time, which the row before it in the same attempt began. It says what the stretch was, and how
many seconds of it went into something else, such as a checkpoint. What a killed process did after its last row counts
as downtime.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from walt_jax.parallel.processes import is_first
from walt_jax.staging import staging

CLOCK = "clock.jsonl"

# What becomes of the time. Goodput is the useful part: steps of training that are done for the first time, less what
# the other parts take of them.
PARTS = ("useful", "again", "compile", "data_wait", "checkpoint", "evaluation", "other", "downtime")

Row = dict[str, Any]


@dataclasses.dataclass
class Attempt:
    """A process that worked on the run.

    Attributes:
        number: 1 for the first.
        seconds: of each part. Its downtime comes before it.
    """

    number: int
    seconds: dict[str, float]


class Account:
    """What the rows so far add up to.

    Attributes:
        attempts: see `Attempt`.
    """

    def __init__(self):
        self.attempts: list[Attempt] = []
        self._done: dict[str, int] = {}  # of each stage, the furthest step
        self._last: Row = {}

    def add(self, row: Row) -> None:
        """Counts the stretch that a row ends; clocks that were set back give stretches of no length."""
        stretch = max(0.0, row["time"] - self._last.get("time", row["time"]))
        if row["what"] == "start":
            waited = stretch if self._last.get("what", "done") != "done" else 0.0
            self.attempts.append(Attempt(len(self.attempts) + 1, dict.fromkeys(PARTS, 0.0) | {"downtime": waited}))
        elif self.attempts:
            seconds = self.attempts[-1].seconds
            named = {part: value for part, value in row.get("seconds", {}).items() if value > 0}
            scale = min(1.0, stretch / sum(named.values())) if named else 0.0
            for part, value in named.items():
                seconds[part] += scale * value
            rest = max(0.0, stretch - scale * sum(named.values()))
            again = self._again(row) if row["what"] == "steps" else 0.0
            part = {"steps": "useful", "evaluation": "evaluation"}.get(row["what"], "other")
            seconds["again"] += again * rest
            seconds[part] += (1 - again) * rest
        self._last = row

    def _again(self, row: Row) -> float:
        """The fraction of a row's steps that had been done before."""
        first, last, done = row["first"], row["last"], self._done.get(row["stage"], 0)
        self._done[row["stage"]] = max(done, last)
        return max(0, min(last, done) - first + 1) / (last - first + 1)

    def seconds(self) -> dict[str, float]:
        """Of each part, in all attempts."""
        return {part: sum(attempt.seconds[part] for attempt in self.attempts) for part in PARTS}

    def goodput(self) -> float:
        """The useful part of all time, 0 to 1."""
        seconds = self.seconds()
        return seconds["useful"] / (sum(seconds.values()) or 1.0)

    def sentence(self) -> str:
        """The goodput and what the rest of the time went into."""
        seconds = self.seconds()
        total = sum(seconds.values())
        others = sorted((part for part in PARTS[1:] if seconds[part] > 0.005 * total), key=seconds.get, reverse=True)
        rest = "".join(f", {part.replace('_', ' ')} {seconds[part] / total:.0%}" for part in others)
        count = len(self.attempts)
        return f"goodput {self.goodput():.0%} of {total:.0f} s in {count} attempt{'s' * (count > 1)}{rest}"


def account(rows: Iterable[Row]) -> Account:
    """Adds up rows of `clock.jsonl`."""
    total = Account()
    for row in rows:
        total.add(row)
    return total


def read_clock(path: pathlib.Path) -> list[Row]:
    """The rows of a file, none where there is no file; a line that was cut off by a kill, or is no row, is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
            account([{"what": "start", "time": 0.0}, row])
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
            continue
        rows.append(row)
    return rows


class Clock:
    """Writes an attempt's rows; of several processes the first one does.

    Args:
        workdir: the run's folder; None writes nothing.
    """

    def __init__(self, workdir: pathlib.Path | None = None):
        rows = [] if workdir is None else read_clock(workdir / CLOCK)
        self.account = account(rows)
        self._run = rows[0]["run"] if rows and "run" in rows[0] else uuid.uuid4().hex[:12]
        self._seconds: dict[str, float] = {}
        self._file = None
        if workdir is not None and is_first():
            self._staging = staging(workdir)
            self._file = self._staging.file(CLOCK).open("ab")
            if self._file.tell():
                self._file.write(b"\n")  # ends a line that was cut off; an empty one is no row
        self._write({"what": "start"})

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Counts the time within as a part of `PARTS`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - began)

    def add(self, part: str, seconds: float) -> None:
        """Counts seconds that have passed since the last row as a part of `PARTS`."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def row(self, what: str, **of: Any) -> dict[str, float]:
        """Ends a stretch.

        Args:
            what: "steps", "evaluation" or "other".
            of: of steps, the "stage" and the numbers of the "first" and "last".

        Returns:
            Goodput and seconds of each part so far, in all attempts, for the log.
        """
        self._write({"what": what, **of, "seconds": self._seconds})
        self._seconds = {}
        named = {f"clock_{part}_seconds": value for part, value in self.account.seconds().items()}
        return {"goodput": self.account.goodput(), **named}

    def _write(self, row: Row) -> None:
        row = {"run": self._run, "attempt": len(self.account.attempts) + (row["what"] == "start"), **row}
        row["time"] = time.time()
        self.account.add(row)
        if self._file is not None:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which must not hide why the run ends
            self.row("done" if error is None else "stopped")
            if self._file is not None:
                self._file.close()
        if self._file is not None:
            with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
                self._staging.upload()
