"""The main job end to end, on the demo shrunk to seconds: files, resuming, seeds."""

import functools
import json
import pathlib
import random
import re
import signal
import time

import commands
import jax
import numpy as np
import pytest

from walt_jax.clock import CLOCK, account, read_clock
from walt_jax.data.drawn import COMBINATIONS
from walt_jax.data.video import read_clip

# As users run it, with all of XLA's optimizations.
run, start = (functools.partial(f, quick=False) for f in (commands.run, commands.start))
STEPS = [(stage, step) for stage in ("tokenizer", "denoiser") for step in range(1, 31)]


@pytest.fixture(scope="module")
def uninterrupted(tiny_run) -> pathlib.Path:
    """The workdir of a run that nothing disturbed."""
    return tiny_run


def test_a_run_leaves_what_it_promises(uninterrupted):
    assert [(stage, step) for stage, step, _ in commands.losses(uninterrupted)] == STEPS
    samples = json.loads((uninterrupted / "samples" / "samples.json").read_text())
    assert [row["prompt"] for row in samples] == [c.caption for c in COMBINATIONS]
    for row in samples[:3]:
        assert read_clip(uninterrupted / "samples" / row["file"]).shape == (5, 16, 16, 3)
    evaluation = json.loads((uninterrupted / "evaluate.json").read_text())
    assert {"reconstruction_psnr_db", "trained_all_right", "held_out_all_right"} <= {
        metric["name"] for metric in evaluation["metrics"]
    }
    assert all(metric["protocol"] for metric in evaluation["metrics"])
    assert len(evaluation["prompts"]) == 72
    for file in ("samples/contact_sheet.png", "reconstructions.png", "preview.png"):
        assert (uninterrupted / file).read_bytes().startswith(b"\x89PNG")
    assert list((uninterrupted / "tensorboard").rglob("events.*"))
    page = (uninterrupted / "report.html").read_text()
    assert COMBINATIONS[0].caption in page and "trained_all_right" in page


def test_the_same_command_again_repeats_nothing(uninterrupted, cache):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    code, _, err = run(commands.TINY, f"--workdir={uninterrupted}", cache=cache)
    assert code == 0, err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def writing_a_checkpoint(workdir: pathlib.Path) -> bool:
    return any("tmp" in path.name for path in workdir.glob("checkpoints/*/*"))


def test_killed_at_any_moment_it_goes_on_to_the_last_bit(uninterrupted, tmp_path, cache):
    """SIGKILL in the first stage, while a checkpoint is written, in the second stage, and at random; then SIGTERM."""
    rng = random.Random(0)
    moments = [
        lambda: lines(tmp_path) >= 5,
        lambda: lines(tmp_path) >= 14 and writing_a_checkpoint(tmp_path),
        lambda: lines(tmp_path) >= 29,
        lambda: lines(tmp_path) >= 30 + rng.randrange(2, 28),
    ]
    kills = 0
    for moment in moments:
        process = start(commands.TINY, f"--workdir={tmp_path}", cache=cache)
        while process.poll() is None and not moment():
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    process = start(commands.TINY, f"--workdir={tmp_path}", cache=cache)
    before = lines(tmp_path)
    while process.poll() is None and (lines(tmp_path) == before or lines(tmp_path) < 32):
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        assert process.returncode == 42 and " of denoiser is saved: the same command resumes from there." in err, err
    code, out, err = run(commands.TINY, f"--workdir={tmp_path}", cache=cache)
    assert code == 0, err
    assert commands.measured(tmp_path) == commands.measured(uninterrupted)
    found, expected = commands.trained(tmp_path), commands.trained(uninterrupted)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    spent = account(read_clock(tmp_path / CLOCK))
    assert len(spent.attempts) >= 5 and out.splitlines()[-2] == spent.sentence()
    for file in ("samples/samples.json", "evaluate.json"):
        assert (tmp_path / file).read_bytes() == (uninterrupted / file).read_bytes()


def test_the_same_seed_gives_the_same_pixels(uninterrupted, tmp_path, cache):
    """Also without --config, alone or among others."""
    prompt = "a blue square moving up"
    several = [f"--prompt={prompt}", "--prompt=A RED circle!", "--seed=1", "--num_samples=2", "--gif"]
    for name, flags in {"several": several, "one": [f"--prompt={prompt}", "--seed=2"]}.items():
        code, out, err = run(
            f"--workdir={uninterrupted}", "--mode=sample", f"--out={tmp_path / name}", *flags, cache=cache
        )
        assert code == 0, err
        assert str(tmp_path / name) in out.splitlines()[-1]
    rows = json.loads((tmp_path / "several" / "samples.json").read_text())
    wanted = [(prompt, 1), (prompt, 2), ("A RED circle!", 1), ("A RED circle!", 2)]
    assert [(row["prompt"], row["seed"]) for row in rows] == wanted
    assert len(list((tmp_path / "several").glob("*.gif"))) == 4
    (one,) = json.loads((tmp_path / "one" / "samples.json").read_text())
    videos = [tmp_path / "several" / row["file"] for row in rows]
    assert videos[1].read_bytes() == (tmp_path / "one" / one["file"]).read_bytes()
    assert videos[0].read_bytes() != videos[1].read_bytes()


def test_a_run_on_the_latents_of_another_is_the_same_to_the_last_bit(uninterrupted, tmp_path, cache):
    """The slow twin is the run that encodes its clips itself; both draw the same ones and train on them alike."""
    encode = [f"--workdir={uninterrupted}", "--mode=encode", "--clips=32", f"--out={tmp_path / 'latents'}"]
    code, out, err = run(*encode, cache=cache)
    assert code == 0, err
    assert f"wrote 32 clips, {32 * 2 * 4 * 4 * 12 * 4:,} bytes of latents" in out
    flags = [
        commands.TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.tokenizer_from={uninterrupted}",
        f"--config.stages.denoiser.latents={tmp_path / 'latents'}",
    ]
    code, out, err = run(*flags, cache=cache)
    assert code == 0, err
    assert commands.losses(tmp_path / "run") == commands.losses(uninterrupted)[30:]
    # It is whole by itself: neither the other run nor the latents are needed to sample from it.
    (tmp_path / "latents").rename(tmp_path / "gone")
    sample = [f"--workdir={tmp_path / 'run'}", "--mode=sample", "--prompt=a red circle moving left"]
    code, out, err = run(*sample, cache=cache)
    assert code == 0, err


def test_evaluate_prints_what_it_writes(uninterrupted, cache):
    code, out, err = run(f"--workdir={uninterrupted}", commands.TINY, "--mode=evaluate", cache=cache)
    assert code == 0, err
    for metric in json.loads((uninterrupted / "evaluate.json").read_text())["metrics"]:
        assert re.search(rf"{metric['name']} +{re.escape(format(metric['value'], '.4g'))}", out)
