"""A run of two processes equals that of one with as many devices, also where it was stopped, or one of them killed."""

import json
import pathlib
import random
import signal
import subprocess
import time

import commands
import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from walt_jax.clock import CLOCK, account, read_clock
from walt_jax.generation import lora_files
from walt_jax.generation.lora import A, B, LoraConfig, targeted

TINY = pathlib.Path(__file__).parents[1] / "configs" / "walt_tiny.py"
KILLS, WATCHED, MINUTE = 30, 4, 60
# A denoiser on the tokenizer of another run: little to compile, for all parts of a run are compiled by each process.
# Its preview is made after the last step: a run that is stopped leaves out one that is due.
LEAST = f"""
from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config():
    config = parent({str(TINY)!r}, "walt_tiny")
    del config.text
    config.data.update(caption_dropout=0.0)
    config.denoiser.update(dim=16, cross_attention=False, classes=72, layers=1, windows=((1, None, None),))
    config.denoiser.update(self_conditioning=False, frame_prediction=False)
    config.diffusion.self_conditioning = 0.0
    config.conditioning = ConfigDict()
    del config.stages["tokenizer"]
    config.stages.denoiser.update(steps=6, batch_size=4, checkpoint_every=4, preview_every=48, cached_clips=8)
    config.stages.denoiser.optimizer = ConfigDict({{"name": "adamw", "learning_rate": 1e-3}})
    config.sampling.update(batch_size=4, steps=1)
    config.sampling.guidance.scale = 1.0
    config.evaluation.update(clips=4)
    return config
"""


@pytest.fixture(scope="module")
def flags(tiny_run, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("config") / "least.py"
    path.write_text(LEAST)
    return [f"--config={path}", f"--config.tokenizer_from={tiny_run}"]


def one_process(flags: list[str], workdir: pathlib.Path, cache: pathlib.Path, devices: int = 4) -> pathlib.Path:
    """A run of one process with several devices. It uses Gloo as well, which adds in an order of its own."""
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={workdir}", cache=cache, processes=1, devices=devices)
    )
    assert codes == [0], errors
    return workdir


def lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(processes: list[subprocess.Popen], workdir: pathlib.Path, count: int) -> None:
    """Waits until so many steps are logged, or a process has ended."""
    while lines(workdir) < count and all(process.poll() is None for process in processes):
        time.sleep(0.01)


def check_equal(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    assert commands.measured(workdir) == commands.measured(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, commands.trained(workdir), commands.trained(expected)))
    for file in ("evaluate.json", "samples/samples.json"):
        assert (workdir / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.slow
def test_two_processes_equal_one_to_the_last_bit_also_when_one_is_asked_to_stop(flags, tmp_path, cache):
    one, two = one_process(flags, tmp_path / "one", cache), tmp_path / "two"
    processes = commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=2)
    wait_for(processes, two, 1)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = commands.ended(processes)
    assert codes == [42, 42], errors
    assert all("of denoiser is saved: the same command resumes from there." in error for error in errors), errors
    assert 1 <= lines(two) < 6
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=2)
    )
    assert codes == [0, 0], errors
    check_equal(two, one)
    assert len(account(read_clock(two / CLOCK)).attempts) == 2  # one writer
    assert (two / "preview.png").read_bytes() == (one / "preview.png").read_bytes()
    assert "reconstruction_psnr_db" in (two / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_encode_clips_and_read_text_as_one_does(tmp_path, cache):
    flags = [commands.TINY, *(f"--config.stages.{stage}.steps=12" for stage in ("tokenizer", "denoiser"))]
    one, two = one_process(flags, tmp_path / "one", cache, devices=2), tmp_path / "two"
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=1)
    )
    assert codes == [0, 0], errors
    check_equal(two, one)
    for path in (one / "latents").rglob("*.array_record*"):
        assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()


def killed(processes: list[subprocess.Popen], victim: int, both: bool) -> tuple[list[int], str, float]:
    """SIGKILL of one, also of the other with `both`; (exit codes, what the other one said, seconds to the end)."""
    began = time.monotonic()
    for process in (processes[victim], *([processes[1 - victim]] if both else [])):
        process.kill()
    codes, errors = commands.ended(processes, seconds=2 * MINUTE)
    return codes, errors[1 - victim], time.monotonic() - began


@pytest.mark.slow
def test_thirty_kills_of_either_process_change_nothing_and_end_the_other_in_a_minute(flags, tmp_path, cache):
    """At random moments of its start and its steps. At first the other ends by itself, later as launchers end it."""
    flags = [*flags, "--config.stages.denoiser.steps=300", "--config.stages.denoiser.preview_every=10000"]
    one, two, rng = one_process(flags, tmp_path / "one", cache), tmp_path / "two", random.Random(1)
    kills, waits = 0, []
    for number in range(KILLS):
        processes = commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=2)
        if number >= WATCHED and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 20))
        else:
            wait_for(processes, two, lines(two) + rng.randrange(1, 4))
            time.sleep(rng.uniform(0, 0.5))
        codes, said, seconds = killed(processes, number % 2, both=number >= WATCHED)
        if codes == [0, 0]:
            break
        kills += codes[number % 2] == -signal.SIGKILL
        if number < WATCHED:
            waits.append(seconds)
            assert codes[1 - number % 2] == 42, (number, codes, said)
            assert "the same command resumes" in said or "is lost" in said, said
    assert kills >= KILLS // 2 and max(waits) < MINUTE
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=2)
    )
    assert codes == [0, 0], errors
    check_equal(two, one)
    print(f"{kills} kills, ended after {max(waits):.0f} s at most: {account(read_clock(two / CLOCK)).sentence()}")


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_processes_and_another_mesh(flags, tmp_path, cache):
    """Sums are then added in another order: losses and metrics agree to 1e-3."""
    one, two = one_process(flags, tmp_path / "one", cache), tmp_path / "two"
    processes = commands.start_together(*flags, f"--workdir={two}", cache=cache, processes=2, devices=2)
    wait_for(processes, two, 1)
    processes[0].send_signal(signal.SIGTERM)
    codes, errors = commands.ended(processes)
    assert codes == [42, 42], errors
    process = commands.start(*flags, f"--workdir={two}", "--config.mesh.fsdp=2", cache=cache, devices=2)
    codes, errors = commands.ended([process])
    assert codes == [0], errors
    for name in ("loss", "gradient_norm", "parameter_norm"):
        found, expected = ([row[name] for row in commands.measured(workdir)] for workdir in (two, one))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    found, expected = (json.loads((workdir / "evaluate.json").read_text())["metrics"] for workdir in (two, one))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["name"] == theirs["name"]
        if ours["name"].startswith(("loss", "reconstruction")):
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-3)


def write_lora(path: pathlib.Path, params: dict) -> None:
    """Of random numbers, large enough to change what is sampled."""
    rng, config, pairs = np.random.default_rng(0), LoraConfig(rank=2, alpha=2.0, targets=("self_attention",)), {}
    for place, kernel in targeted(params, config.targets).items():
        *stack, wide, high = kernel.shape
        pairs[*place, A] = rng.normal(size=(*stack, wide, 2)).astype(np.float32)
        pairs[*place, B] = rng.normal(size=(*stack, 2, high)).astype(np.float32)
    lora_files.write(path, unflatten_dict(pairs), config)


@pytest.mark.slow
def test_merged_parameters_of_8_bits_are_sampled_by_two_processes_as_by_one(flags, tmp_path, cache):
    """With parameters that are divided over all devices, so of both processes."""
    run = one_process(flags, tmp_path / "run", cache)
    write_lora(tmp_path / lora_files.FILE, commands.trained(run)["denoiser"]["ema"])
    asked = [*flags, "--mode=sample", f"--workdir={run}", "--config.mesh.data=1", "--config.mesh.fsdp=4"]
    asked += ["--prompt=a red circle moving up", "--no_metadata"]
    changed = ["--int8", f"--lora={tmp_path / lora_files.FILE}"]
    found = {}
    for name, processes, more in (("plain", 1, []), ("one", 1, changed), ("two", 2, changed)):
        started = commands.start_together(
            *asked, *more, f"--out={tmp_path / name}", cache=cache, processes=processes, devices=4 // processes
        )
        codes, errors = commands.ended(started)
        assert codes == [0] * processes, errors
        found[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.mp4")}
    assert len(found["one"]) == 1
    assert found["two"] == found["one"] != found["plain"]
