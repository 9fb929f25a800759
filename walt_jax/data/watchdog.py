"""Decoding that always comes back: in processes that are killed and replaced when they hang or crash.

FFmpeg's code can't be interrupted from Python: neither a thread nor a signal handler gets a word in before its call
returns.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import numpy as np
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.video import DEFAULT_LIMITS, read_clip

# Who hangs in Python is given so long to say so; then the kernel's alarm, and then the parent, ends it.
GRACE_SECONDS = 1

# Long enough for imports from a cold network disk.
START_SECONDS = 120

LONGEST_SECONDS = 10**6  # that every clock takes


class Watchdog:
    """Calls functions in worker processes, which start when they are first needed and stay for the next call.

    Threads may share it: there are as many workers as calls at a time. A worker whose parent dies ends with its call,
    or when that call's time is up.
    """

    def __init__(self):
        self._pid = os.getpid()
        self._idle = queue.SimpleQueue()
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

    def call(self, seconds: float, function: Callable[..., Any], *args, **kwargs) -> Any:
        """What the function returns or raises.

        Args:
          seconds: after which its process is killed.
          function: of a module that can be imported; it, its arguments and what it returns are pickled.

        Raises:
          ClipError: it takes longer, or its process dies.
        """
        worker = self._worker()
        try:
            good, value = worker.call(min(seconds, LONGEST_SECONDS), function, args, kwargs)
        except BaseException:
            worker.kill()
            raise
        self._idle.put(worker)
        if good:
            return value
        raise value

    def _worker(self) -> "_Worker":
        """An idle worker or a new one."""
        if self._pid != os.getpid():  # forked: those workers are the parent's
            self.__init__()
        with contextlib.suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
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
            self._answer(START_SECONDS, "the decoding process does not start")
        except BaseException:
            self.kill()
            raise

    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, seconds: float, function: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[bool, Any]:
        """Whether the function returned, and what it returned or raised."""
        self._connection.send((seconds, function, args, kwargs))
        return self._answer(seconds + GRACE_SECONDS, f"decoding hangs: stopped after {seconds:g} s")

    def kill(self) -> None:
        self._process.kill()
        self._connection.close()
        # A process that waits for a dead disk can't be killed; then it is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)

    def _answer(self, seconds: float, late: str) -> tuple[bool, Any]:
        if not self._connection.poll(seconds):
            raise ClipError(late)
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
        if code == -signal.SIGALRM:
            raise ClipError(late)
        raise ClipError(f"decoding crashes: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")


def _end(workers: queue.SimpleQueue, pid: int) -> None:
    """Kills the workers of a process, unless this is a fork of it."""
    with contextlib.suppress(queue.Empty):
        while pid == os.getpid():
            workers.get_nowait().kill()


def _serve() -> None:
    """The worker's life: it answers calls until its parent hangs up."""
    parent = connection.Connection(int(sys.argv[1]))
    parent.send((True, None))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            seconds, function, args, kwargs = parent.recv()
            # The kernel's alarm ends this process even where Python can't, and where no parent is left to do so.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer = True, function(*args, **kwargs)
            except Exception as error:
                answer = False, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send(answer)
