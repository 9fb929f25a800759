"""Signals that would raise in the main thread, held back while a file is written that must not be left broken."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

HELD = (signal.SIGINT, signal.SIGTERM)


class Hold:
    """Signals that arrive are noted; within `allowed`, and at the end, their handlers run, which may raise."""

    def __init__(self):
        self._handlers: dict[int, Any] = {}
        self._noted: list[int] = []

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within, signals are handled as they were before; those noted so far at once."""
        try:
            self._restore()
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers, and runs them
            note = self._note
            self._handlers = {number: signal.signal(number, note) for number in HELD}

    def _note(self, number: int, frame: Any) -> None:
        self._noted.append(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        noted, self._noted = self._noted, []
        for number in noted:
            if callable(handler := self._handlers[number]):
                handler(number, None)


@contextlib.contextmanager
def held() -> Iterator[Hold]:
    """Holds back SIGINT and SIGTERM within, see `Hold`; in other threads than the main one it does nothing."""
    hold = Hold()
    hold._hold()
    try:
        yield hold
    finally:
        hold._restore()
