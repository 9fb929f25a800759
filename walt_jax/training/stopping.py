"""SIGINT and SIGTERM: a stage that trains saves its step first, everything else stops at once."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        signal: its number; the exit code is 128 more, as a shell has it.
        saved: what has been saved, for a message.
    """

    def __init__(self, number: int, stage: str = "", step: int = 0):
        self.signal = number
        self.saved = f"step {step} of {stage} is saved" if stage else "the last checkpoint is complete"
        super().__init__(self.saved)


def stop_at_once() -> None:
    """SIGTERM raises `Stopped` from now on, as SIGINT raises KeyboardInterrupt. For the main thread."""

    def handle(number: int, frame: Any) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGTERM, handle)


@dataclasses.dataclass
class Stop:
    """The number of the signal that asked to stop, or 0."""

    signal: int = 0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes the first SIGINT or SIGTERM in what it gives, so that a step can be ended and saved.

    A second signal raises `Stopped` at once: Orbax leaves a checkpoint complete or absent whenever it is interrupted.
    Only the main thread receives signals; in other threads nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.signal:
            raise Stopped(number)
        stop.signal = number

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
