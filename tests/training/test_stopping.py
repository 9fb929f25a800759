"""A signal ends the process with 42, also while the main thread runs no Python, and not before what is saved is."""

import os
import signal
import subprocess
import sys
import time

import pytest

from walt_jax.training.stopping import Stopped, stop_signals

# A call that holds the main thread in C for a minute, as XLA's compiler does.
SCRIPT = """
import hashlib, sys, time
from walt_jax.training import stopping
stopping.stop_at_once(grace=2.0, quiet=0.3)
def blocked():
    print("blocked", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
IN_A_STAGE = "with stopping.stop_signals() as stop:\n    stop.unsaved = {unsaved}\n    blocked()"


def ended(script: str, number: int = signal.SIGTERM) -> tuple[int, float, str]:
    """(exit code, seconds after the signal, standard error) of a script, signalled once it is blocked."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.1)
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - start, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_compilation_is_ended_soon_where_nothing_is_lost(number):
    for script in ("blocked()", IN_A_STAGE.format(unsaved=False)):
        code, seconds, err = ended(script, number)
        assert code == 42 and 0.3 <= seconds < 1.8
        assert err.strip() == "stopped; the last checkpoint is complete: the same command resumes from there."


def test_steps_that_are_not_saved_have_the_grace_period():
    code, seconds, _ = ended(IN_A_STAGE.format(unsaved=True))
    assert code == 42 and seconds >= 2.0


def test_a_checkpoint_that_is_being_written_is_waited_for():
    script = "start = time.monotonic()\nstopping.WRITING.append(lambda: time.monotonic() < start + 3)\nblocked()"
    code, seconds, _ = ended(script)
    assert code == 42 and seconds >= 2.5


def test_what_can_be_left_out_is_left_out():
    """A preview ends at once, and the stage goes on to save its step."""
    done = []
    with stop_signals() as stop:
        with stop.skipped():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("preview")
        done.append("saved")
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert done == ["saved"]
