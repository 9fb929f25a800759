"""A run that is killed thirty times, and one that is asked to stop a dozen times, end as if nothing had happened."""

import pathlib
import random
import signal
import subprocess
import time

import commands
import jax
import numpy as np
import pytest

from walt_jax.clock import CLOCK, account, read_clock

pytestmark = pytest.mark.slow

KILLS, STOPS, GRACE_SECONDS = 30, 12, 30
FLAGS = [commands.TINY, "--config.stages.tokenizer.steps=300", "--config.stages.denoiser.steps=300"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    code, _, err = commands.run(*FLAGS, f"--workdir={workdir}", cache=cache, quick=False)
    assert code == 0, err
    return workdir


def check_equal(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    assert commands.measured(workdir) == commands.measured(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, commands.trained(workdir), commands.trained(expected)))
    assert (workdir / "evaluate.json").read_bytes() == (expected / "evaluate.json").read_bytes()


def signal_at_random(workdir: pathlib.Path, cache: pathlib.Path, number: int, rng: random.Random) -> int | None:
    """Starts the run and sends it a signal some time after its start, or a few steps later; returns its exit code."""
    metrics = workdir / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0  # noqa: E731
    process = commands.start(*FLAGS, f"--workdir={workdir}", cache=cache, quick=False)
    end = time.monotonic() + (rng.uniform(0, 15) if rng.random() < 0.3 else 600)
    least, more = lines(), rng.randrange(30)
    while process.poll() is None and time.monotonic() < end and lines() <= least + more:
        least = min(least, lines())  # steps since the last checkpoint are done again
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    else:
        process.communicate()
    return process.returncode


def test_thirty_kills(uninterrupted, tmp_path, cache):
    rng = random.Random(1)
    codes = [signal_at_random(tmp_path, cache, signal.SIGKILL, rng) for _ in range(KILLS)]
    assert codes.count(-signal.SIGKILL) >= 0.8 * KILLS
    code, _, err = commands.run(*FLAGS, f"--workdir={tmp_path}", cache=cache, quick=False)
    assert code == 0, err
    check_equal(tmp_path, uninterrupted)
    spent = account(read_clock(tmp_path / CLOCK))
    print(f"{codes.count(-signal.SIGKILL)} kills: {spent.sentence()}")


def test_a_dozen_stops(uninterrupted, tmp_path):
    """With nothing compiled before, so that some come while XLA compiles; others come in encoding and evaluation."""
    rng, cache = random.Random(2), tmp_path / "compiled"
    codes = [signal_at_random(tmp_path / "run", cache, signal.SIGTERM, rng) for _ in range(STOPS)]
    # Python that has not begun yet is ended by the signal itself, which launchers restart as well.
    assert set(codes) <= {42, 0, -signal.SIGTERM} and codes.count(42) >= STOPS // 2
    code, _, err = commands.run(*FLAGS, f"--workdir={tmp_path / 'run'}", cache=cache, quick=False)
    assert code == 0, err
    check_equal(tmp_path / "run", uninterrupted)
    print(f"{codes.count(42)} stops: {account(read_clock(tmp_path / 'run' / CLOCK)).sentence()}")
