"""`metrics.jsonl` and TensorBoard: one object a logged step, each step once, whatever was interrupted and resumed."""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tensorboardX

from walt_jax.parallel.processes import is_first
from walt_jax.staging import staging
from walt_jax.workdir import write_atomically


class MetricsLog:
    """Appends to `workdir/metrics.jsonl` and to `workdir/tensorboard/STAGE`; of several processes the first one does.

    Args:
        workdir: the run's folder.
        stage: its name.
        step: steps that the stage's checkpoint has done: later lines are dropped, their steps will be done again.
        constant: what each line has as well, JSON.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, step: int, constant: dict[str, Any] | None = None):
        self.stage, self._constant, self._writes = stage, constant or {}, is_first()
        if not self._writes:
            return
        local = staging(workdir)
        self._path = local.file("metrics.jsonl")
        remove_lines(self._path, lambda row: row["stage"] == stage and row["step"] > step)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(local.folder / "tensorboard" / stage), purge_step=step + 1)

    def write(
        self,
        step: int,
        values: dict[str, float],
        warnings: Sequence[str] = (),
        stated: dict[str, Any] | None = None,
    ) -> None:
        """A line with the values and, where there are any, a list of `warnings`; and what else is stated, JSON."""
        if not self._writes:
            return
        said = {"warnings": list(warnings)} if warnings else {}
        self._file.write(
            json.dumps({"stage": self.stage, "step": step, **values, **self._constant, **said, **(stated or {})}) + "\n"
        )
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def remove(self, stage: str) -> str:
        """Takes another stage's lines out of the file and returns them."""
        if not self._writes:
            return ""
        self._file.close()
        removed = remove_lines(self._path, lambda row: row["stage"] == stage)
        self._file = self._path.open("a")
        return removed

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._board.close()


def remove_lines(path: pathlib.Path, which: Callable[[dict], bool]) -> str:
    """Rewrites the file without the lines that `which` names, and without those that `read_metrics` skips.

    Returns:
        The lines that `which` named.
    """
    rows = read_metrics(path)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if not which(row)))
    return "".join(json.dumps(row) + "\n" for row in rows if which(row))


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The objects of `metrics.jsonl`, none where there is no file.

    A last line that was cut off when the process was killed is left out. Other lines that are not an object with
    `stage` and `step` are skipped with a warning.
    """
    if not path.exists():
        return []
    rows, skipped = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            skipped.append(number)
    if skipped:
        some = ", ".join(map(str, skipped[:5])) + (", …" if len(skipped) > 5 else "")
        print(
            f"warning: {path} has {len(skipped)} lines that are no metrics (line {some}); they are skipped.",
            file=sys.stderr,
        )
    return rows
