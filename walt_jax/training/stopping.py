"""SIGINT and SIGTERM: a stage that trains saves its step first, everything else stops at once; the exit code is 42.

Python runs signal handlers in the main thread, between two bytecodes: while XLA compiles or a step runs there, none is
called. So a thread, which the operating system's own handler wakes, ends the process where the main thread does not.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from walt_jax.parallel.processes import RESTART, leave

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Launchers kill a process 30 s after SIGTERM, unless they are configured otherwise.
GRACE_SECONDS = 25.0  # at most so long a step that is not saved yet is waited for
QUIET_SECONDS = 3.0  # the same once everything is saved
LONGEST_WRITE = 10  # times the grace period, for the checkpoint that is being written; launchers may allow that

# Of the checkpoints and videos that are open for writing: whether one is incomplete. The process isn't ended meanwhile.
WRITING: list[Callable[[], bool]] = []


RESUMES = "the last checkpoint is complete: the same command resumes from there"
_left = RESUMES


def leaves(sentence: str) -> None:
    """Sets what a process that is stopped says that it leaves, and what the same command does, without a full stop."""
    global _left
    _left = sentence


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        signal: its number.
        saved: what has been saved, and what the same command does, for a message.
        together: whether all processes have stopped after the same step.
    """

    def __init__(self, number: int, stage: str = "", step: int = 0):
        self.signal, self.together = number, bool(stage)
        self.saved = f"step {step} of {stage} is saved: the same command resumes from there" if stage else _left
        super().__init__(self.saved)


@dataclasses.dataclass
class Stop:
    """How a stage stops.

    Attributes:
        signal: the number of the signal that asked to stop, or 0.
        unsaved: whether steps have been done that no checkpoint has; the stage sets it.
    """

    signal: int = 0
    unsaved: bool = False
    _at_once: bool = False

    @contextlib.contextmanager
    def skipped(self) -> Iterator[None]:
        """Within is something that can be left out: a signal is noted and ends it at once."""
        self._at_once = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self._at_once = False


_current = Stop()  # of the stage that trains


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes the first SIGINT or SIGTERM in what it gives, so that a step can be ended and saved.

    A second signal raises `Stopped` at once: Orbax leaves a checkpoint complete or absent whenever it is interrupted.
    Only the main thread receives signals; in other threads nothing is noted.
    """
    global _current
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.signal:
            raise Stopped(number)
        stop.signal = number
        if stop._at_once:
            raise Stopped(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    _current = stop
    try:
        yield stop
    finally:
        _current = Stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once(grace: float = GRACE_SECONDS, quiet: float = QUIET_SECONDS) -> None:
    """SIGINT and SIGTERM raise `Stopped` from now on, and end the process where that takes too long.

    For the main thread of a program, once.

    Args:
        grace: seconds after which the process ends although steps are not saved.
        quiet: the same once everything is saved.
    """

    def handle(number: int, frame: Any) -> None:
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken, grace, quiet), daemon=True, name="signals").start()


def _watch(woken: int, grace: float, quiet: float) -> NoReturn:
    """Ends the process some time after a signal, unless the main thread has done so."""
    while os.read(woken, 1)[0] not in SIGNALS:
        pass
    asked = saved = time.monotonic()
    while time.monotonic() < saved + quiet:
        waited = time.monotonic() - asked
        writes = any(writing() for writing in WRITING) and waited < LONGEST_WRITE * grace
        if writes or (_current.unsaved and waited < grace):
            saved = time.monotonic()
        time.sleep(0.05)
    sys.stderr.write(f"\nstopped; {_left}.\n")
    sys.stdout.flush()
    leave(RESTART, "a signal stopped it")
    os._exit(RESTART)
