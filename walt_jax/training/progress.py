"""A stage's progress: a bar on a terminal, a line each 15 seconds in a log file; with rate, loss and time left."""

import sys

import tqdm

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts the steps of a stage.

    Args:
        name: the stage's.
        start: steps done before.
        total: steps in all.
    """

    def __init__(self, name: str, start: int, total: int):
        terminal, self._mfu = sys.stderr.isatty(), ""
        self._bar = tqdm.tqdm(
            desc=name,
            initial=start,
            total=total,
            unit="step",
            mininterval=0.5 if terminal else LINE_EVERY_SECONDS,
            maxinterval=float("inf"),
            smoothing=0.1,
            dynamic_ncols=terminal,
            bar_format=None
            if terminal
            else "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
        )

    def update(self, loss: float, mfu: float | None = None) -> None:
        """A step more; the model FLOPs utilisation stays until there is a newer one."""
        self._mfu = self._mfu if mfu is None else f", mfu={mfu:.1%}"
        self._bar.set_postfix_str(f"loss={loss:.4f}{self._mfu}", refresh=False)
        self._bar.update()

    def warn(self, sentence: str) -> None:
        """A line that stays."""
        self._bar.write(f"warning: {sentence}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
