"""A tokenizer alone: on images, then on both, against a discriminator; killed and resumed; files of any length."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip

MAGVIT2 = [
    "--config=configs/magvit2_video.py",
    "--config.data.source=drawn",
    "--config.data.frames=5",
    "--config.data.height=16",
    "--config.data.width=16",
    "--config.tokenizer.base_channels=4",
    "--config.tokenizer.channel_multipliers=(1, 2, 2)",
    "--config.tokenizer.downsample=((1, 2, 2), (2, 2, 2))",
    "--config.tokenizer.norm_groups=2",
    "--config.tokenizer.residual_blocks=1",
    "--config.tokenizer.latent_channels=8",
    "--config.tokenizer.dtype=float32",
    "--config.losses.discriminator.base_channels=4",
    "--config.losses.discriminator.channel_multipliers=(1,)",
    "--config.evaluation.clips=8",
    "--config.evaluation.distances=()",  # of clips of 9 frames or more
]
for stage, steps in {"images": 6, "video": 12}.items():
    knobs = {"steps": steps, "batch_size": 2, "log_every": 1, "checkpoint_every": 4}
    MAGVIT2 += [f"--config.stages.{stage}.{name}={value}" for name, value in knobs.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "magvit2"
    code, out, err = commands.run(*MAGVIT2, f"--workdir={workdir}", cache=cache)
    assert code == 0, err
    assert "report.html" in out.splitlines()[-1]
    return workdir


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(trained):
    steps = [(row["stage"], row["step"]) for row in rows(trained)]
    assert steps == [("images", step) for step in range(1, 7)] + [("video", step) for step in range(1, 13)]
    logged = {"psnr_db", "code_usage", "code_perplexity", "entropy", "r1", "discriminator_loss", "adversarial"}
    assert logged <= set(rows(trained)[-1])
    evaluation = json.loads((trained / "evaluate.json").read_text())
    metrics = {metric["name"]: metric for metric in evaluation["metrics"]}
    assert {"reconstruction_psnr_db", "reconstruction_ssim", "code_usage", "code_perplexity"} <= set(metrics)
    # 3 × 4 × 4 positions of 8 bits for 5 frames of 16 × 16.
    assert metrics["bits_per_pixel"]["value"] == pytest.approx(3 * 4 * 4 * 8 / (5 * 16 * 16))
    assert all(metric["protocol"] for metric in metrics.values())
    assert len(evaluation["reconstructions"]) == 8
    assert {point["codec"] for point in evaluation["rate_distortion"]} == {"this tokenizer", "H.264"}
    for file in ("reconstructions.png", "rate_distortion.png"):
        assert (trained / file).read_bytes().startswith(b"\x89PNG")
    assert "rate_distortion.png" in (trained / "report.html").read_text()


def test_both_shapes_are_trained_on_and_the_video_stage_starts_from_the_images(trained):
    """At a learning rate of a warm-up's first step it still reconstructs as the image tokenizer did."""
    by_stage = {stage: [row for row in rows(trained) if row["stage"] == stage] for stage in ("images", "video")}
    assert by_stage["video"][0]["psnr_db"] > by_stage["images"][0]["psnr_db"] - 1.5


def test_killed_in_each_stage_it_goes_on_to_the_last_bit(trained, tmp_path, cache):
    for enough in (5, 6 + 7):
        process = commands.start(*MAGVIT2, f"--workdir={tmp_path}", cache=cache)
        path = tmp_path / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= enough):
            time.sleep(0.002)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = commands.run(*MAGVIT2, f"--workdir={tmp_path}", cache=cache)
    assert code == 0, err
    assert commands.losses(tmp_path) == commands.losses(trained)
    assert (tmp_path / "evaluate.json").read_bytes() == (trained / "evaluate.json").read_bytes()


@pytest.mark.parametrize(("frames", "size"), [(1, (16, 16)), (23, (30, 45)), (34, (17, 16))])
def test_a_file_of_any_length_and_size_is_reconstructed(frames, size, trained, tmp_path, cache):
    clip = draw(COMBINATIONS[5], np.random.default_rng(0), frames, 48)[:, : size[0], : size[1]]
    write_video(tmp_path / "in.mp4", clip, fps=12)
    flags = ["--mode=reconstruct", f"--video={tmp_path / 'in.mp4'}", f"--out={tmp_path / 'new' / 'out.mp4'}"]
    code, out, err = commands.run(f"--workdir={trained}", *flags, cache=cache)
    assert code == 0, err
    assert f"wrote {frames} frames" in out
    assert read_clip(tmp_path / "new" / "out.mp4").shape == read_clip(tmp_path / "in.mp4").shape
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--video=none.mp4", "--out=OUT.mp4"], ["none.mp4", "can't be opened"]),
        (["--video=setup.py", "--out=OUT.mp4"], ["setup.py", "not a video"]),
        (["--video=none.mp4", "--out=OUT.webm"], ["OUT.webm", ".mp4"]),
        (["--out=OUT.mp4"], ["--video"]),
    ],
)
def test_a_file_that_can_not_be_reconstructed_is_named(flags, words, trained, tmp_path, cache):
    flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    code, _, err = commands.run(f"--workdir={trained}", "--mode=reconstruct", *flags, cache=cache)
    assert code == 1 and "Traceback" not in err
    assert all(word.replace("OUT", "out") in err.splitlines()[-1] for word in words)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_head_is_refused(trained, tmp_path, cache):
    flags = [*MAGVIT2, "--config.tokenizer.head.name=continuous", "--config.tokenizer.head.groups=1"]
    code, _, err = commands.run(*flags, f"--workdir={trained}", "--mode=evaluate", cache=cache)
    assert code == 1
    assert "config.tokenizer.head" in err.splitlines()[-1] and "Traceback" not in err


def test_sampling_needs_a_denoiser(trained, cache):
    code, _, err = commands.run(f"--workdir={trained}", "--mode=sample", "--prompt=a", cache=cache)
    assert code == 1 and "--mode=reconstruct" in err.splitlines()[-1]


PEAK = """
import resource, sys
from walt_jax.main import main
from walt_jax.malloc import keep_freed_memory

keep_freed_memory()
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_length(trained, tmp_path):
    """1,000 frames against 100: no more than 3 % of the peak."""
    peaks = {}
    for frames in (100, 1000):
        path = tmp_path / f"{frames}.mp4"
        write_video(path, np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3), np.uint8), fps=25)
        flags = ["--mode=reconstruct", f"--video={path}", f"--out={tmp_path / 'out.mp4'}", f"--workdir={trained}"]
        out = subprocess.run([sys.executable, "-c", PEAK, *flags], cwd=commands.ROOT, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peaks[frames] = int(out.stdout.splitlines()[-1])
    assert peaks[1000] < 1.03 * peaks[100], peaks
