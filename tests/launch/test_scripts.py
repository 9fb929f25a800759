"""The scripts that run on TPU workers and in Slurm's jobs, with a fake trainer and fake Slurm commands."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch.command_line import CLONE

FAKE = pathlib.Path(__file__).parent / "fake_trainer.py"


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited for 10 s"
        time.sleep(0.02)


def started(folder: pathlib.Path) -> bool:
    """Whether the fake trainer is ready for signals."""
    return (folder / "starts").exists() and (folder / "starts").read_text() != ""


@pytest.fixture
def home(tmp_path):
    """A TPU worker's home folder, with the clone and the environment that worker.sh install would make."""
    (tmp_path / "walt_jax").symlink_to(CLONE)
    (tmp_path / "walt_jax_venv" / "bin").mkdir(parents=True)
    (tmp_path / "walt_jax_venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def worker(home: pathlib.Path, *arguments: str, codes: str = "0") -> subprocess.Popen:
    variables = {**os.environ, "HOME": str(home), "STARTS": str(home / "starts"), "CODES": codes}
    command = ["bash", "walt_jax/launch/worker.sh", *arguments]
    return subprocess.Popen(
        command, cwd=home, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def said(process: subprocess.Popen) -> str:
    return process.communicate(timeout=20)[0]


def trains(home: pathlib.Path, codes: str) -> subprocess.Popen:
    return worker(home, "run", "3", "0", "python", str(FAKE), "--a=b c", codes=codes)


def test_a_worker_trains_to_the_end_and_shows_its_log(home):
    assert "nothing was run" in said(worker(home, "status"))
    process = trains(home, "42 0")
    log = said(process)
    assert process.returncode == 0
    assert "start 0: 42" in log and "start 1: 0" in log
    assert (home / "starts").read_text() == "--a=b c\n" * 2
    assert "ended with exit code 0" in said(worker(home, "status"))


def test_a_workers_mistake_is_final(home):
    process = trains(home, "1")
    said(process)
    assert process.returncode == 1
    assert "ended with exit code 1" in said(worker(home, "status"))


def test_training_outlives_a_connection_and_is_not_started_twice(home):
    first = trains(home, "wait")
    wait_for(lambda: started(home))
    first.kill()
    first.wait()
    second = trains(home, "wait")
    wait_for(lambda: "start 0" in second.stdout.readline())
    assert "running" in said(worker(home, "status"))
    assert "ended with exit code 42" in said(worker(home, "stop"))
    assert "saved after signal 15" in said(second)
    assert second.returncode == 42
    assert (home / "starts").read_text().count("\n") == 1


def test_what_was_killed_without_an_exit_code_starts_again(home):
    (home / "walt_jax_run").mkdir()
    (home / "walt_jax_run" / "pid").write_text("4194304999")  # of no process
    process = trains(home, "0")
    said(process)
    assert process.returncode == 0


@pytest.fixture
def slurm(tmp_path):
    """Fake Slurm commands: srun runs its command once, scontrol and squeue write down what they are asked."""
    programs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/queued',
        "squeue": 'echo "$STATE"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def start(codes: str, state: str = "RUNNING", restarts: str = "", pause: str = "0") -> subprocess.Popen:
        variables = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STARTS": str(tmp_path / "starts"),
            "CODES": codes,
            "STATE": state,
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_PER_TASK": "4",
        } | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
        command = ["bash", f"{CLONE}/launch/slurm_job.sh", "2", pause, sys.executable, str(FAKE), "--a=b c"]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.folder = tmp_path
    return start


@pytest.mark.parametrize(
    ("codes", "code", "times", "queued"),
    [
        ("0", 0, 1, False),
        ("1", 1, 1, False),
        ("-9 139 0", 0, 3, False),  # crashes start again on the same nodes
        ("139", 139, 3, False),
        ("42", 42, 1, True),  # before the time limit
        ("-9 42", 42, 2, True),
    ],
)
def test_slurms_job(slurm, codes, code, times, queued):
    process = slurm(codes)
    printed = said(process)
    assert process.returncode == code, printed
    assert (slurm.folder / "starts").read_text() == "--a=b c\n" * times
    assert (slurm.folder / "queued").exists() == queued
    if queued:
        assert (slurm.folder / "queued").read_text() == "requeue 17\n"


@pytest.mark.parametrize(("state", "restarts"), [("CANCELLED", ""), ("PREEMPTED", ""), ("RUNNING", "2")])
def test_jobs_that_are_not_queued_again(slurm, state, restarts):
    process = slurm("42", state, restarts)
    assert "not queued again" in said(process)
    assert process.returncode == 42
    assert not (slurm.folder / "queued").exists()


def test_slurms_job_passes_sigterm_on_and_waits(slurm):
    process = slurm("wait", state="PREEMPTED")
    wait_for(lambda: started(slurm.folder))
    process.send_signal(signal.SIGTERM)
    assert "saved after signal 15" in said(process)
    assert process.returncode == 42


def test_sigterm_ends_a_pause_of_slurms_job(slurm):
    process = slurm("139", pause="60")
    wait_for(lambda: "restart 1" in process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert process.returncode == 139
