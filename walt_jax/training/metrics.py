"""`metrics.jsonl` and TensorBoard: one object a logged step, each step once, whatever was interrupted and resumed."""

import json
import pathlib
from collections.abc import Sequence

import tensorboardX

from walt_jax.workdir import write_atomically


class MetricsLog:
    """Appends to `workdir/metrics.jsonl` and to `workdir/tensorboard/STAGE`.

    Args:
        workdir: the run's folder.
        stage: its name.
        step: steps that the stage's checkpoint has done: what was logged after it is dropped, for those steps will be
            done again.
        later_stages: their lines are dropped too.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, step: int, later_stages: tuple[str, ...]):
        self.stage = stage
        path = workdir / "metrics.jsonl"
        kept = [
            line
            for line, row in read_lines(path)
            if row["stage"] not in later_stages and (row["stage"] != stage or row["step"] <= step)
        ]
        write_atomically(path, "".join(kept))
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float], warnings: Sequence[str] = ()) -> None:
        """A line with the values and, where there are any, a list of `warnings`."""
        said = {"warnings": list(warnings)} if warnings else {}
        self._file.write(json.dumps({"stage": self.stage, "step": step, **values, **said}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_lines(path: pathlib.Path) -> list[tuple[str, dict]]:
    """Each line and its object; a last line that was cut off when the process was killed is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [(line, json.loads(line)) for line in lines if line.endswith("\n")]
