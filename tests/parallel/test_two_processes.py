"""Two processes of four devices each, through the command line, against one process of eight."""

import os
import signal
import socket
import subprocess
import sys
import time

import commands
import numpy as np
import pytest

pytestmark = pytest.mark.slow
FLAGS = (
    commands.TINY,
    "--config.stages.tokenizer.steps=6",
    "--config.stages.denoiser.steps=6",
    "--config.stages.tokenizer.batch_size=8",
    "--config.stages.denoiser.batch_size=8",
    "--config.evaluation.clips=8",
    "--config.mesh.fsdp=2",
)


def start(workdir, log, cache, devices, *flags):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "walt_jax.main", *FLAGS, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=commands.ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def start_two(workdir, tmp_path, cache):
    """(the processes, their logs)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    logs = [tmp_path / f"{workdir.name}{index}.log" for index in range(2)]
    together = f"--coordinator={address}", "--num_processes=2"
    return [start(workdir, log, cache, 4, *together, f"--process_id={i}") for i, log in enumerate(logs)], logs


def ended(processes, logs, code):
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=600) == code, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    """The workdir of one process with eight devices."""
    folder = tmp_path_factory.mktemp("one")
    process = start(folder / "run", folder / "log", cache, 8)
    assert process.wait(timeout=600) == 0, (folder / "log").read_text()[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache):
    """The workdir of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    processes, logs = start_two(folder / "run", folder, cache)
    ended(processes, logs, 0)
    return folder / "run"


def test_two_processes_are_one(one, two):
    """Losses of each step but for rounding: Gloo adds the devices' parts in another order than one process does."""
    found, expected = commands.losses(two), commands.losses(one)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([float(row[2]) for row in found], [float(row[2]) for row in expected], rtol=1e-5)
    for name in ("report.html", "evaluate.json", "samples/samples.json", "preview.png"):
        assert (two / name).stat().st_size > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_takes_the_other_along_and_the_run_goes_on(two, tmp_path, cache, victim):
    """To the last bit, as if nothing had happened."""
    workdir = tmp_path / "killed"
    processes, logs = start_two(workdir, tmp_path, cache)
    try:
        metrics, end = workdir / "metrics.jsonl", time.monotonic() + 400
        while not metrics.exists() or "denoiser" not in metrics.read_text():
            assert time.monotonic() < end and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert processes[1 - victim].wait(timeout=120) != 0 and time.monotonic() - killed < 60
        assert "process" in logs[1 - victim].read_text()[-2000:]
    finally:
        for process in processes:
            process.kill()
    ended(*start_two(workdir, tmp_path, cache), 0)
    assert {row[:2]: row[2] for row in commands.losses(workdir)} == {row[:2]: row[2] for row in commands.losses(two)}
