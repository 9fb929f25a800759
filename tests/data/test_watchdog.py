"""Decoding in processes: what hangs or crashes in C ends in time, and the next call is none the worse."""

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


def test_it_reads_what_reading_here_gives(watchdog, tmp_path):
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
    time.sleep(0.7)  # the alarm of a call that is over does not ring
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
    """`read_clip` where FFmpeg's decoder never comes back from C; in a worker's process, it is not put back."""
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


def test_a_worker_that_dies_between_calls_is_nobodys_fault(watchdog):
    pid = watchdog.call(5, os.getpid)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: gone(pid))
    assert watchdog.call(5, os.getpid) != pid


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
