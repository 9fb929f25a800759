"""Decoding that always comes back: in processes that are killed and replaced when they hang or crash.

FFmpeg's code can't be interrupted from Python: neither a thread nor a signal handler gets a word in before its call
returns.
"""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import numpy as np
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.video import DEFAULT_LIMITS, read_clip, read_frames

# A worker that hangs in Python has so long to report it; then the kernel's alarm, then the parent, ends it.
GRACE_SECONDS = 1

# Long enough for imports from a cold network disk.
START_SECONDS = 120

LONGEST_SECONDS = 10**6  # that every clock takes

READY = "ready"  # a worker's word that it has started, and that it has a call, before it does anything for it


class _CrashError(ClipError):
    """A worker has died."""


class _GoneError(ClipError):
    """A worker has died before it began with a call."""


class Watchdog:
    """Calls functions in worker processes, which start when they are first needed and stay for the next call.

    Threads may share it: there are as many workers as calls at a time. A worker whose parent dies ends with its call,
    or when that call's time is up. One that dies without a call, as when memory runs out, is replaced unnoticed.
    """

    def __init__(self):
        self._pid = os.getpid()
        self._idle = collections.deque()  # the last one to be idle is the first to work: so few have large heaps
        weakref.finalize(self, _end, self._idle, self._pid)  # at the latest when the interpreter ends

    def __reduce__(self):
        return Watchdog, ()  # what is pickled to another process starts its own workers

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers; a later call starts new ones."""
        _end(self._idle, self._pid)

    def read_clip(self, path: epath.PathLike, *args, limits: DecodeLimits = DEFAULT_LIMITS, **kwargs) -> np.ndarray:
        """`video.read_clip` with the same arguments, whatever the file does to the decoder.

        Raises:
          ClipError: as there, and where the decoder hangs beyond `limits.wall_seconds`, or crashes.
        """
        return self.call(limits.wall_seconds + GRACE_SECONDS, read_clip, path, *args, limits=limits, **kwargs)

    def read_frames(
        self, path: epath.PathLike, *args, limits: DecodeLimits = DEFAULT_LIMITS, **kwargs
    ) -> Iterator[np.ndarray]:
        """`video.read_frames` with the same arguments, whatever the file does to the decoder.

        Raises:
          ClipError: as there, and where a frame takes longer than `limits.wall_seconds`, or the decoder crashes.
        """
        return self.iterate(limits.wall_seconds + GRACE_SECONDS, read_frames, path, *args, limits=limits, **kwargs)

    def call(self, seconds: float, function: Callable[..., Any], *args, **kwargs) -> Any:
        """What the function returns or raises.

        Args:
          seconds: after which its process is killed.
          function: of a module that can be imported; it, its arguments and what it returns are pickled.

        Raises:
          ClipError: it takes longer, or its process dies.
        """
        worker, value = self._call(seconds, function, args, kwargs)
        self._give_back(worker)
        return value

    def iterate(self, seconds: float, function: Callable[..., Iterator[Any]], *args, **kwargs) -> Iterator[Any]:
        """What the iterator gives or raises that the function returns; all of it happens in one process.

        Args:
          seconds: for any one item, after which the process is killed.
          function: as in `call`, and so are the items.

        Raises:
          ClipError: an item takes longer, or the process dies.
        """
        worker, _ = self._call(seconds, _open, (function, args, kwargs), {})
        try:
            while item := worker.call(seconds, _next):
                yield item[0]
        finally:
            if worker.alive():
                with contextlib.suppress(ClipError):
                    worker.call(seconds, _close)
            self._give_back(worker)

    def _call(self, seconds: float, function: Callable[..., Any], args: tuple, kwargs: dict) -> tuple["_Worker", Any]:
        """What the function returns, and the worker that called it, which is not idle yet."""
        for make in (self._worker, _Worker):  # the second time surely a new one
            worker = make()
            try:
                return worker, worker.call(seconds, function, *args, **kwargs)
            except _GoneError as error:
                gone = error
            except BaseException:
                self._give_back(worker)
                raise
        raise gone

    def _give_back(self, worker: "_Worker") -> None:
        if worker.alive():
            self._idle.append(worker)

    def _worker(self) -> "_Worker":
        """An idle worker or a new one."""
        if self._pid != os.getpid():  # forked: those workers are the parent's
            self.__init__()
        with contextlib.suppress(IndexError):
            while True:
                worker = self._idle.pop()
                if worker.alive():
                    return worker
                worker.kill()
        return _Worker()


class _Worker:
    """A process and the socket to it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        # Not multiprocessing: it would import the main module again, with JAX, and is forbidden to a data loader's
        # daemonic workers.
        command = [sys.executable, "-c", "from walt_jax.data import watchdog; watchdog._serve()", str(theirs.fileno())]
        modules = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": modules},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's affair
            )
        self._connection = connection.Connection(ours.detach())
        try:
            self._receive(time.monotonic() + START_SECONDS, "the decoding process does not start")
        except BaseException:
            self.kill()
            raise

    def alive(self) -> bool:
        return not self._connection.closed and self._process.poll() is None

    def call(self, seconds: float, function: Callable[..., Any], *args, **kwargs) -> Any:
        """What the function returns or raises; where it does neither, the process is not alive afterwards.

        Raises:
          ClipError: it takes longer, or its process dies: a `_GoneError` if that was before it began.
        """
        seconds = min(seconds, LONGEST_SECONDS)
        end, late = time.monotonic() + seconds + GRACE_SECONDS, f"decoding hangs: stopped after {seconds:g} s"
        try:
            try:
                self._connection.send((seconds, function, args, kwargs))
                self._receive(end, late)
            except (BrokenPipeError, ConnectionResetError, _CrashError) as error:
                raise _GoneError("the decoding process has died") from error
            good, value = self._receive(end, late)
        except BaseException:
            self.kill()
            raise
        if good:
            return value
        raise value

    def kill(self) -> None:
        self._process.kill()
        self._connection.close()
        # A process that waits for a dead disk can't be killed; then it is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)

    def _receive(self, end: float, late: str) -> Any:
        """What the process says next.

        Raises:
          ClipError: it has not said anything by then: a `_CrashError` if it died.
        """
        if not self._connection.poll(max(0, end - time.monotonic())):
            raise ClipError(late)
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
        if code == -signal.SIGALRM:
            raise ClipError(late)
        raise _CrashError(f"decoding crashes: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")


def _end(workers: collections.deque["_Worker"], pid: int) -> None:
    """Kills the workers of a process, unless this is a fork of it."""
    with contextlib.suppress(IndexError):
        while pid == os.getpid():
            workers.pop().kill()


def _serve() -> None:
    """The worker's life: it answers calls until its parent hangs up."""
    parent = connection.Connection(int(sys.argv[1]))
    parent.send(READY)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            seconds, function, args, kwargs = parent.recv()
            parent.send(READY)
            # The kernel's alarm ends this process even where Python can't, and where no parent is left to do so.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer = True, function(*args, **kwargs)
            except Exception as error:
                answer = False, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send(answer)


_iterators: list[Iterator[Any]] = []  # of a worker: the one that is open


def _open(function: Callable[..., Iterator[Any]], args: tuple, kwargs: dict) -> None:
    _iterators[:] = [iter(function(*args, **kwargs))]


def _next() -> tuple[Any] | None:
    """The next item in a tuple, or None where there is none."""
    return next(((item,) for item in _iterators[0]), None)


def _close() -> None:
    _iterators.clear()
