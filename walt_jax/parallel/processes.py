"""Several processes as one program: how they find each other, wait for each other, and end together.

What they exchange goes through JAX's coordination service, which process 0 runs, and not through devices: a thread of
one process never waits for a program of another.
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from walt_jax.errors import UserError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 40.0  # after which a process counts as lost; a busy one still beats, from a thread
JOIN_SECONDS = 300
PATIENCE_MS = 24 * 3600 * 1000  # of those that wait for a slow process; a lost one ends them all sooner
RESTART = 42  # exit code after a signal or a lost process: launchers start the same command again; a mistake's is 1

GONE = "process 0, which the others need, is gone; the same command resumes from the last checkpoint"

# What is called before this process ends, also where that is at once: gives back what others would wait for.
GIVE_BACK: list[Callable[[], None]] = []

_client: Any = None  # JAX's, None for one process
_handler: Any = None
_ended = threading.Event()
_numbers = itertools.count()  # of exchanges, which all processes have in the same order


def initialise(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes, before JAX touches a device. One process needs nothing.

    Args:
        coordinator: HOST:PORT of process 0; without, they are found on Cloud TPU, GKE and Slurm, as JAX does.
        count: number of processes.
        index: of this one.

    Raises:
        UserError: if only some are given, they can't be, or the others can't be joined.
    """
    _check(coordinator, count, index)
    import jax
    from jax._src import xla_bridge  # JAX has no public name for it

    if coordinator is None and xla_bridge.backends_are_initialized():
        return  # called by a program that computes already: one process
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    ours = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=JOIN_SECONDS,
            # A process that has done its part waits for the others, which may still write.
            shutdown_timeout_seconds=PATIENCE_MS // 1000,
        )
    except ValueError:
        if coordinator is not None:
            raise
        return  # none of the environments that JAX knows
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Process {index} of {count} could not join the others at --coordinator={coordinator} ({reason}); start "
            "all of them with the same address, which process 0 can listen on, and a --process_id each."
        ) from error
    signal.signal(signal.SIGTERM, ours)  # JAX has put its own there
    if jax.process_count() > 1:
        _begin(jax.process_index(), jax.process_count())


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    flags = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in flags.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing; a process has all of {', '.join(flags)}, or none of them.")
    if coordinator is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator} is no HOST:PORT, such as 10.0.0.2:1234.")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} should be from 0 to {count - 1}, as --num_processes is {count}.")


def _begin(index: int, count: int) -> None:
    from jax._src.distributed import global_state  # JAX has no public name for it

    global _client
    _client = global_state.client
    if index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (results are printed once)
        _explain_abort(global_state.coordinator_address)
    threading.Thread(target=_watch, args=(_client, index, count), daemon=True).start()


def _explain_abort(coordinator: str) -> None:
    """Where process 0 is gone, JAX's client aborts from a thread in C++, with a stack trace and code 134.

    Its callback for that can't be written in Python: its argument has no conversion, which aborts too.
    """
    host, _, port = coordinator.rpartition(":")

    def aborted(number: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT_SECONDS).close()
        except OSError:
            _end(GONE, RESTART)
        libc.signal(number, None)  # something else: abort as ever

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    global _handler  # must not be freed
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


def _watch(client: Any, index: int, count: int) -> None:
    """Beats; ends this process with a sentence when another one has failed or is lost."""
    seen: dict[str, tuple[str, float]] = {}
    for beat in itertools.count():
        if _ended.wait(BEAT_SECONDS if beat else 0.0):
            return
        try:
            client.key_value_set(f"walt/alive/{index}", str(beat), allow_overwrite=True)
            failed = client.key_value_dir_get("walt/failed/")
            beats = dict(client.key_value_dir_get("walt/alive/")) if index == 0 else {}
        except Exception:  # whatever the lost connection is called
            if _ended.is_set():
                return
            _end(GONE, RESTART)
        if failed:
            who, (code, sentence) = failed[0][0].rsplit("/", 1)[-1], json.loads(failed[0][1])
            _end(f"process {who} stopped: {sentence}", code)
        now = time.monotonic()
        for name, value in beats.items():
            if seen.get(name, ("", 0.0))[0] != value:
                seen[name] = (value, now)
        for name, (value, since) in seen.items():
            if value != "done" and now - since > SILENT_SECONDS:
                who = name.rsplit("/", 1)[-1]
                sentence = f"it has not been heard of for {SILENT_SECONDS:.0f} s; its host or itself was killed"
                _publish_failure(who, sentence, RESTART)
                _end(f"process {who} is lost: {sentence}", RESTART)


def _end(sentence: str, code: int) -> None:
    """Ends this process at once: its main thread may wait for a program that will never be done."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    _give_back()
    os._exit(code)


def _give_back() -> None:
    for give_back in list(GIVE_BACK):
        give_back()


def _publish_failure(who: str, sentence: str, code: int) -> None:
    with contextlib.suppress(Exception):  # the coordinator may be gone, or another sentence there
        _client.key_value_set(f"walt/failed/{who}", json.dumps([code, sentence]))


def leave(code: int, sentence: str = "") -> int:
    """Called last. A process that failed says why to the others in a sentence, and does not wait for them.

    Returns:
        The exit code.
    """
    _give_back()
    if _client is None:
        return code
    import jax

    _ended.set()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if sentence:
        _publish_failure(str(jax.process_index()), sentence, code)
        if jax.process_index() == 0:
            time.sleep(2 * BEAT_SECONDS)  # the others read it from here
        os._exit(code)
    with contextlib.suppress(Exception):
        _client.key_value_set(f"walt/alive/{jax.process_index()}", "done", allow_overwrite=True)
    return code


def is_first() -> bool:
    """Whether this process writes files and prints results; one process always does."""
    if _client is None:
        return True
    import jax

    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """(index of this process, how many there are)"""
    if _client is None:
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def exchanged(value: Any) -> list[Any]:
    """The JSON values that all processes pass, by their index. They wait for each other."""
    if _client is None:
        return [value]
    import jax

    number, mine = next(_numbers), jax.process_index()
    _client.key_value_set(f"walt/exchange/{number}/{mine}", json.dumps(value))
    keys = (f"walt/exchange/{number}/{index}" for index in range(jax.process_count()))
    values = [json.loads(_client.blocking_key_value_get(key, PATIENCE_MS)) for key in keys]
    if number:  # all are here, so have read the values before
        _client.key_value_delete(f"walt/exchange/{number - 1}/{mine}")
    return values


def together(program: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a jitted function; if its arguments are on devices of several processes, once all have compiled it.

    Where a program communicates for the first time, Gloo waits 30 s for the other processes, and they may take longer
    than each other to compile it.
    """
    import jax

    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(arguments)):
        owner = getattr(program, "__self__", None)
        ready(program, *([] if owner is None else [owner]), *arguments)
    return program(*arguments)


def ready(program: Any, *arguments: Any) -> None:
    """Compiles a jitted function for a call that follows, in all processes; they wait for each other."""
    if _client is not None:
        program.lower(*arguments).compile()  # JAX keeps it
        exchanged(None)


@contextlib.contextmanager
def one_after_the_first() -> Iterator[bool]:
    """Within, process 0 gets True and the others False; they leave it when process 0 has."""
    yield is_first()
    exchanged(None)


def agreed_stop(requested: int, stage: str, step: int) -> int:
    """The signal for which all processes stop after this step, or 0. Called by all, once a step.

    Called when a step has been started and the one before is complete. The first process with a signal names the step
    after the next. Where another one asks for that step, the next one is complete, so this process has started it,
    which it does after the name is there.

    Args:
        requested: the signal that this process has got, or 0.
        stage: its name.
        step: that has been started.
    """
    if _client is None:
        return requested
    key = f"walt/stop/{stage}"
    if requested:
        with contextlib.suppress(Exception):  # another process was first
            _client.key_value_set(key, json.dumps([step + 2, requested]))
    try:
        at, number = json.loads(_client.key_value_try_get(key))
    except Exception:  # it is not there
        return 0
    return number if step >= at else 0


def merged(states: Sequence[Any]) -> Any:
    """JSON objects of several processes as one, which has the entries of all.

    Raises:
        RuntimeError: if two differ where both have something: processes that should do the same have not.
    """
    first, *others = states
    for other in others:
        if isinstance(first, dict) and isinstance(other, dict):
            names = {**first, **other}
            first = {name: merged([state[name] for state in (first, other) if name in state]) for name in names}
        elif first != other:
            raise RuntimeError(f"processes disagree: {first!r} and {other!r}")
    return first


def fetched(array: Any) -> np.ndarray:
    """All of an array, in each process; called by all of them if it is divided over several."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def divided(count: int, compute: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """compute([0, …, count - 1]), of which each process does a part; called by all of them.

    Args:
        count: at least 1.
        compute: indices to a row each, an array whose other axes are of the same size for all indices. It runs
            nothing that several processes do together.

    Returns:
        The rows of all, in each process.
    """
    index, processes = place()
    if processes == 1:
        return compute(list(range(count)))
    from jax.experimental import multihost_utils

    size = -(-count // processes)
    mine = [min(index + processes * number, count - 1) for number in range(size)]  # padded, so that all have as many
    rows = multihost_utils.process_allgather(compute(mine))
    return rows.swapaxes(0, 1).reshape(size * processes, *rows.shape[2:])[:count]


def of_lost_process(error: BaseException | None) -> bool:
    """Whether an error may be that of a program that has waited for a lost process."""
    import jax

    while _client is not None and error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def guarded(run: Callable[[], int]) -> int:
    """Runs a program; where one process fails with a traceback, the others end too."""
    try:
        return run()
    except Exception as error:
        if _client is None:
            raise
        import traceback

        traceback.print_exc()
        if of_lost_process(error):  # the thread that watches says who
            time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
        return leave(1, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
