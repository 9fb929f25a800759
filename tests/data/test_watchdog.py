"""Decoding in worker processes: calls that hang or crash in C end in time, and later calls work."""

import concurrent.futures
import ctypes
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from walt_jax.data import video
from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.data.watchdog import Watchdog

FRAMES = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def watchdog():
    with Watchdog() as watchdog:
        yield watchdog


def gone(pid):
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # the first one may be gone before the others
        return len(threads) == 1 and pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_it_reads_what_the_function_reads(watchdog, tmp_path):
    write_video(tmp_path / "clip.mp4", FRAMES, 8)
    want = read_clip(tmp_path / "clip.mp4", 16, max_frames=7, short_side=16, start=2)
    got = watchdog.read_clip(tmp_path / "clip.mp4", 16, max_frames=7, short_side=16, start=2)
    np.testing.assert_array_equal(got, want)
    got[0] = 0  # the caller's own
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ClipError, match=r"^empty file$"):
        watchdog.read_clip(tmp_path / "empty.mp4")
    with pytest.raises(ZeroDivisionError):
        watchdog.call(5, divmod, 1, 0)


def test_a_process_serves_many_calls(watchdog):
    assert len({watchdog.call(5, os.getpid) for _ in range(5)}) == 1
    assert watchdog.call(5, os.getpid) != os.getpid()
    pid = watchdog.call(0.5, os.getpid)
    time.sleep(0.7)  # the alarm of a finished call is off
    assert watchdog.call(5, os.getpid) == pid


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (re.match, (r"(a*)*b", "a" * 40)),  # spins in C and holds the interpreter's lock
        (time.sleep, (1000,)),
    ],
    ids=["spinning in C", "sleeping"],
)
def test_what_hangs_is_stopped_and_replaced(watchdog, function, args):
    pid = watchdog.call(5, os.getpid)
    start = time.monotonic()
    with pytest.raises(ClipError, match=r"^decoding hangs: stopped after 0\.5 s$"):
        watchdog.call(0.5, function, *args)
    assert 0.4 < time.monotonic() - start < 1.5
    assert gone(pid)
    assert watchdog.call(5, divmod, 7, 2) == (3, 1)


def read_with_a_hanging_decoder(path, **kwargs):
    """`read_clip` with a decoder that never returns from C; patched for good, in a worker's process."""
    video.decoded = lambda *_: iter([re.match(r"(a*)*b", "a" * 40)])
    return read_clip(path, **kwargs)


def test_a_decoder_that_never_returns(watchdog, tmp_path):
    write_video(tmp_path / "clip.mp4", FRAMES, 8)
    pid = watchdog.call(5, os.getpid)
    with pytest.raises(ClipError, match=r"^decoding hangs: stopped after 1 s$"):
        watchdog.call(1, read_with_a_hanging_decoder, tmp_path / "clip.mp4", limits=DecodeLimits(wall_seconds=0.2))
    assert gone(pid)
    assert len(watchdog.read_clip(tmp_path / "clip.mp4")) == len(FRAMES)


def test_what_crashes_says_so(watchdog):
    with pytest.raises(ClipError, match=r"^decoding crashes: SIGSEGV$"):
        watchdog.call(5, ctypes.string_at, 0)
    with pytest.raises(ClipError, match=r"^decoding crashes: exit code 3$"):
        watchdog.call(5, os._exit, 3)
    assert watchdog.call(5, divmod, 7, 2) == (3, 1)


def test_a_worker_that_dies_between_calls_is_replaced(watchdog):
    pid = watchdog.call(5, os.getpid)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: gone(pid))
    assert watchdog.call(5, os.getpid) != pid


def test_a_worker_that_dies_as_it_gets_a_call_is_replaced():
    with Watchdog() as watchdog, concurrent.futures.ThreadPoolExecutor(3) as pool:
        pids = [future.result() for future in [pool.submit(watchdog.call, 5, slow_pid) for _ in range(3)]]
        assert len(set(pids)) == 3  # so that the next worker is dead too
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # alive, but never begins
        call = pool.submit(watchdog.call, 30, os.getpid)
        time.sleep(0.3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert call.result() not in pids
        assert watchdog.call(5, os.getpid) == call.result()


def slow_pid():
    time.sleep(0.5)
    return os.getpid()


def crash_and_tell(path):
    with open(path, "a") as file:
        file.write("called\n")
    os.abort()


def test_a_call_that_crashes_is_not_tried_again(watchdog, tmp_path):
    with pytest.raises(ClipError, match=r"^decoding crashes: SIGABRT$"):
        watchdog.call(5, crash_and_tell, tmp_path / "calls")
    assert (tmp_path / "calls").read_text() == "called\n"


def test_workers_that_never_begin_are_an_error(watchdog):
    with pytest.raises(ClipError, match=r"^the decoding process has died$"):
        watchdog.call(5, divmod, Unreadable(), 2)
    assert watchdog.call(5, divmod, 7, 2) == (3, 1)


class Unreadable:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


# Item by item


def count_up(stop, path=None):
    """Yields numbers with the process id; hangs after 1."""
    try:
        for number in range(stop):
            yield number, os.getpid()
            if number == 1:
                time.sleep(1000)
    finally:
        if path:
            path.write_text("closed")


def test_items_come_one_by_one_from_one_process(watchdog):
    pid = watchdog.call(5, os.getpid)
    assert list(watchdog.iterate(5, count_up, 1)) == [(0, pid)]
    assert list(watchdog.iterate(5, range, 1000)) == list(range(1000))
    assert list(watchdog.iterate(5, range, 0)) == []
    assert watchdog.call(5, os.getpid) == pid


def test_an_abandoned_iterator_is_closed_and_its_process_is_reused(watchdog, tmp_path):
    items = watchdog.iterate(5, count_up, 5, tmp_path / "told")
    _, pid = next(items)
    assert watchdog.call(5, os.getpid) != pid and not (tmp_path / "told").exists()
    items.close()
    assert (tmp_path / "told").read_text() == "closed"
    assert watchdog.call(5, os.getpid) == pid


def test_what_an_iterator_raises(watchdog, tmp_path):
    items = watchdog.iterate(0.5, count_up, 5)
    assert next(items)[0] == 0
    assert next(items)[0] == 1
    with pytest.raises(ClipError, match=r"^decoding hangs: stopped after 0\.5 s$"):
        next(items)
    items = watchdog.iterate(5, map, divmod, [7, 7], [2, 0])
    assert next(items) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        next(items)
    items = watchdog.iterate(5, map, os._exit, [3])
    with pytest.raises(ClipError, match=r"^decoding crashes: exit code 3$"):
        next(items)
    with pytest.raises(ZeroDivisionError):
        next(watchdog.iterate(5, divmod, 1, 0))
    assert watchdog.call(5, divmod, 7, 2) == (3, 1)


def test_a_process_that_dies_between_two_items_ends_the_iterator(watchdog):
    items = watchdog.iterate(5, count_up, 5)
    _, pid = next(items)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: gone(pid))
    with pytest.raises(ClipError, match=r"^the decoding process has died$"):
        next(items)
    assert watchdog.call(5, divmod, 7, 2) == (3, 1)


def test_sequential_calls_use_one_process():
    with Watchdog() as watchdog, concurrent.futures.ThreadPoolExecutor(2) as pool:
        pids = {future.result() for future in [pool.submit(watchdog.call, 5, slow_pid) for _ in range(2)]}
        assert len(pids) == 2
        assert len({watchdog.call(5, os.getpid) for _ in range(6)}) == 1  # the other one's memory does not grow


def test_threads_share_it(watchdog):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        slow = pool.submit(watchdog.call, 5, time.sleep, 0.5)
        hanging = pool.submit(watchdog.call, 0.5, time.sleep, 1000)
        assert [pool.submit(watchdog.call, 5, divmod, i, 2).result() for i in range(5)] == [
            divmod(i, 2) for i in range(5)
        ]
        assert slow.result() is None
        assert isinstance(hanging.exception(), ClipError)


def test_a_copy_in_another_process_starts_its_own(watchdog):
    with pickle.loads(pickle.dumps(watchdog)) as copy:
        assert copy.call(5, os.getpid) != watchdog.call(5, os.getpid)


@pytest.mark.parametrize("end", ["pass", "import os; os.kill(os.getpid(), 9)"])
def test_no_worker_outlives_its_parent(end):
    program = f"""
        import os
        from walt_jax.data.watchdog import Watchdog
        watchdog = Watchdog()
        print(watchdog.call(5, os.getpid), flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert wait_until(lambda: gone(int(done.stdout)))


def test_a_worker_that_hangs_outlives_its_parent_only_until_its_time_is_up():
    program = """
        import os, re, threading, time
        from walt_jax.data.watchdog import Watchdog
        watchdog = Watchdog()
        print(watchdog.call(5, os.getpid), flush=True)
        threading.Thread(target=watchdog.call, args=(3, re.match, r"(a*)*b", "a" * 40), daemon=True).start()
        time.sleep(0.3)
        os.kill(os.getpid(), 9)
    """
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began > 3  # it holds the pipe, so this waits for it
    assert wait_until(lambda: gone(int(done.stdout)))


def test_calls_leave_no_descriptor_open():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    with Watchdog() as watchdog:
        watchdog.call(5, os.getpid)
    before = descriptors()
    for _ in range(3):
        with Watchdog() as watchdog, pytest.raises(ClipError):
            watchdog.call(5, os._exit, 1)
    assert descriptors() == before
