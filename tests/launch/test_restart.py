"""Trainers start again after preemptions and crashes, not after mistakes, and are asked to save before they end."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch.command_line import CLONE
from launch.restart import supervise

TRAINER = [sys.executable, str(pathlib.Path(__file__).parent / "fake_trainer.py")]


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The file with a line a start of the fake trainer."""
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


def count(starts: pathlib.Path) -> int:
    return len(starts.read_text().splitlines())


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("codes", "code", "times"),
    [
        ("42 42 0", 0, 3),
        ("1", 1, 1),
        ("2", 2, 1),
        ("126", 126, 1),
        ("127 255 0", 0, 3),
        ("-9 -11 0", 0, 3),  # killed, a segmentation fault
        ("42", 42, 4),  # 3 restarts
        ("-6", 134, 4),
    ],
)
def test_exit_codes(starts, monkeypatch, codes, code, times):
    monkeypatch.setenv("CODES", codes)
    assert supervise(TRAINER, max_restarts=3, pause_seconds=0) == code
    assert count(starts) == times


def test_it_pauses_before_a_restart(starts, monkeypatch):
    monkeypatch.setenv("CODES", "42 0")
    begin = time.monotonic()
    assert supervise(TRAINER, max_restarts=1, pause_seconds=0.5) == 0
    assert time.monotonic() - begin > 0.5


def test_a_command_that_is_not_there_is_a_sentence(capsys):
    assert supervise(["/no/such/python"], max_restarts=3, pause_seconds=0) == 1
    assert "/no/such/python can't be run" in capsys.readouterr().err


def test_signal_handlers_are_put_back(starts, monkeypatch):
    monkeypatch.setenv("CODES", "0")
    before = signal.getsignal(signal.SIGTERM)
    supervise(TRAINER, max_restarts=0, pause_seconds=0)
    assert signal.getsignal(signal.SIGTERM) is before


def host(tmp_path, codes: str, pause: int = 0) -> subprocess.Popen:
    """The launcher of one host of GPUs, on the fake trainer instead of walt_jax.main."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {" ".join(TRAINER)} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "host.toml").write_text(
        f'runs = "{tmp_path}/runs"\npython = "{tmp_path}/python"\npause_seconds = {pause}\n[env]\nCODES = "{codes}"\n'
    )
    command = ["-m", "launch.gpu_host", "launch", f"--cluster={tmp_path}/host.toml", "--name=r", "--", "--config=c.py"]
    variables = {**os.environ, "PYTHONPATH": CLONE}
    return subprocess.Popen([sys.executable, *command], env=variables, stdout=subprocess.PIPE, text=True)


def test_one_host_trains_to_the_end(starts, tmp_path):
    process = host(tmp_path, "42 42 0")
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert starts.read_text() == f"-m walt_jax.main --workdir={tmp_path}/runs/r --config=c.py\n" * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_trainer_which_saves_and_stays_ended(starts, tmp_path, number):
    process = host(tmp_path, "wait")
    wait_for(lambda: starts.exists() and count(starts))
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    expected = signal.SIGTERM if number == signal.SIGHUP else number
    assert f"saved after signal {int(expected)}" in printed
    assert process.returncode == 42
    assert count(starts) == 1


def test_a_signal_ends_the_pause(starts, tmp_path):
    process = host(tmp_path, "42", pause=60)
    wait_for(lambda: starts.exists() and count(starts))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 42
    assert count(starts) == 1
