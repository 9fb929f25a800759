"""Decoding with a timeout: in worker processes, which are killed and replaced when they hang or crash.

A call into FFmpeg can't be interrupted from Python: other threads can't stop it, and signal handlers run only after it
has returned.
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

# Extra seconds at each level of the timeout: first the worker's own stopwatch raises, then the kernel's alarm ends the
# worker, then the parent kills it.
GRACE_SECONDS = 1

# Time for a worker to start; imports from a cold network disk are slow.
START_SECONDS = 120

LONGEST_SECONDS = 10**6  # upper bound of timeouts; timers reject much larger ones

READY = "ready"  # a worker sends this once it has started, and again when it has received a call, before running it


class _CrashError(ClipError):
    """A worker has died."""


class _GoneError(ClipError):
    """A worker has died before it began a call; another worker can try again."""


class Watchdog:
    """Calls functions in worker processes, which start on demand and are reused.

    Thread-safe: there are as many workers as concurrent calls. If the parent dies, a worker exits after its current
    call, or when that call times out. An idle worker that dies, for example when memory runs out, is replaced silently.
    """

    def __init__(self):
        self._pid = os.getpid()
        self._idle = collections.deque()  # used as a stack, so that few workers grow large heaps
        weakref.finalize(self, _end, self._idle, self._pid)  # also runs when the interpreter exits

    def __reduce__(self):
        return Watchdog, ()  # a pickled copy starts workers of its own

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers; a later call starts new ones."""
        _end(self._idle, self._pid)

    def read_clip(self, path: epath.PathLike, *args, limits: DecodeLimits = DEFAULT_LIMITS, **kwargs) -> np.ndarray:
        """`video.read_clip` with the same arguments, in a worker.

        Raises:
          ClipError: as there, and if the decoder takes longer than `limits.wall_seconds` or crashes.
        """
        return self.call(limits.wall_seconds + GRACE_SECONDS, read_clip, path, *args, limits=limits, **kwargs)

    def read_frames(
        self, path: epath.PathLike, *args, limits: DecodeLimits = DEFAULT_LIMITS, **kwargs
    ) -> Iterator[np.ndarray]:
        """`video.read_frames` with the same arguments, in a worker.

        Raises:
          ClipError: as there, and if a frame takes longer than `limits.wall_seconds` or the decoder crashes.
        """
        return self.iterate(limits.wall_seconds + GRACE_SECONDS, read_frames, path, *args, limits=limits, **kwargs)

    def call(self, seconds: float, function: Callable[..., Any], *args, **kwargs) -> Any:
        """Returns or raises what the function does.

        Args:
          seconds: timeout, after which the worker is killed.
          function: importable by name; it, its arguments and its result are pickled.

        Raises:
          ClipError: on timeout, or if the worker dies.
        """
        worker, value = self._call(seconds, function, args, kwargs)
        self._give_back(worker)
        return value

    def iterate(self, seconds: float, function: Callable[..., Iterator[Any]], *args, **kwargs) -> Iterator[Any]:
        """Yields the items of the iterator that the function returns, which stays in one worker.

        Args:
          seconds: timeout for each item, after which the worker is killed.
          function: as in `call`; the items are pickled too.

        Raises:
          ClipError: on timeout, or if the worker dies.
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
        """The function's result, and the worker that ran it, which the caller has to give back."""
        for make in (self._worker, _Worker):  # the second try is on a new worker
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
        if self._pid != os.getpid():  # after a fork the idle workers belong to the parent
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
        # Not multiprocessing: it imports the main module again, with JAX, and daemonic processes, such as a data
        # loader's workers, may not use it.
        command = [sys.executable, "-c", "from walt_jax.data import watchdog; watchdog._serve()", str(theirs.fileno())]
        modules = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": modules},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C goes to the parent only
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
        """Returns or raises what the function does.

        Raises:
          ClipError: on timeout, or if the process dies (`_GoneError` if that was before the call began); either way the
            process is dead afterwards.
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
        # A process blocked on a dead disk can't be killed; don't wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)

    def _receive(self, end: float, late: str) -> Any:
        """The process's next message.

        Args:
          end: deadline, of `time.monotonic`.
          late: message of the error on timeout.

        Raises:
          ClipError: on timeout; a `_CrashError` if the process died.
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
    """Kills idle workers, unless this process is a fork of their parent."""
    with contextlib.suppress(IndexError):
        while pid == os.getpid():
            workers.pop().kill()


def _serve() -> None:
    """A worker's main loop: runs calls until the parent closes the connection."""
    parent = connection.Connection(int(sys.argv[1]))
    parent.send(READY)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            seconds, function, args, kwargs = parent.recv()
            parent.send(READY)
            # The kernel's alarm ends this process even inside a call to FFmpeg, and when the parent is dead.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer = True, function(*args, **kwargs)
            except Exception as error:
                answer = False, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send(answer)


_iterators: list[Iterator[Any]] = []  # a worker's open iterator, if any


def _open(function: Callable[..., Iterator[Any]], args: tuple, kwargs: dict) -> None:
    _iterators[:] = [iter(function(*args, **kwargs))]


def _next() -> tuple[Any] | None:
    """The next item in a tuple, or None at the end."""
    return next(((item,) for item in _iterators[0]), None)


def _close() -> None:
    _iterators.clear()
