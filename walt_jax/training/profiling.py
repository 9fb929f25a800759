"""A trace of some steps of a stage, for TensorBoard's profile plugin or Perfetto."""

import contextlib
import pathlib
from typing import Any

import jax

from walt_jax.errors import UserError
from walt_jax.parallel.processes import is_first
from walt_jax.staging import staging

Steps = tuple[int, int]


def profile_steps(text: str) -> Steps:
    """ "10:15" as (10, 15).

    Raises:
        UserError: if it is not the numbers of two steps, the first not after the second.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile_steps={text} should be the first and the last step to trace, counted from 1: "
            "--profile_steps=10:15."
        )
    return int(first), int(last)


class Profile:
    """Traces steps of a stage, counted from the first one that this process does; nothing without `steps`.

    Of several processes the first one traces its own devices.

    Args:
        workdir: of the run; the trace is in its folder `profile/STAGE`.
        stage: its name.
        steps: first and last, both traced.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, steps: Steps | None):
        self._workdir, self._stage, self._steps = workdir, stage, steps if is_first() else None
        self._count, self._running = 0, False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Within, a step is done; `number` names it in the trace."""
        self._count += 1
        if self._steps is None:
            return contextlib.nullcontext()
        if self._count == self._steps[0]:
            jax.profiler.start_trace(staging(self._workdir).folder / "profile" / self._stage)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else contextlib.nullcontext()

    def done(self, results: Any) -> None:
        """Ends the trace after its last step, when the device has computed the step's results."""
        if self._running and self._count == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
