"""The main job on packs of clips and images, with classes and observed frames; killed, resumed and sampled from."""

import json
import pathlib
import signal
import time

import commands
import pytest

from walt_jax.data.latents import LatentClips

CONFIG = """
import runpy

from ml_collections import ConfigDict


def get_config():
    config = runpy.run_path("configs/walt_tiny.py")["get_config"]()
    shapes = {"clip": {}, "short": {"height": 8, "width": 8}, "image": {"frames": 1}}
    del config.text
    config.tokenizer.block_transform = True
    config.denoiser.update(
        cross_attention=False, classes=72, positions="fractional", relative="rotary", isolate_images=True,
        frame_prediction=True, patch_size=(1, 1, 1), windows=((1, None, None), (None, 2, 2)),
    )
    config.conditioning = ConfigDict({"frames": (1,), "probability": 0.5})
    config.diffusion = ConfigDict(
        {"schedule": {"name": "flow"}, "parameterization": "flow", "times": {"name": "logit_normal"},
         "self_conditioning": 0.9, "base_tokens": 32, "min_snr": 5.0, "adaptive": 0.0}
    )
    config.stages.tokenizer.update(steps=4, checkpoint_every=4)
    config.stages.denoiser.update(
        steps=12, checkpoint_every=4, batch_size=2, shapes=shapes, pack={"tokens": 64, "clips": 4}, cached_clips=12
    )
    config.sampling = ConfigDict(
        {"sampler": "heun", "steps": 2, "guidance": {"scale": 2.0, "kind": "interval", "interval": (0.2, 0.8)}}
    )
    config.evaluation.update(clips=2)
    return config
"""


@pytest.fixture(scope="module")
def flag(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "packed.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.fixture(scope="module")
def trained(flag, tmp_path_factory, cache) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("packed") / "run"
    code, _, err = commands.run(flag, f"--workdir={workdir}", cache=cache)
    assert code == 0, err
    return workdir


def test_packs_are_trained_on(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "denoiser"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    # Clips have 32, 8 and 16 tokens: packs of 64 can nearly always be filled.
    assert all(0.5 < row["tokens_valid_fraction"] <= 1 for row in rows)
    sizes = LatentClips(trained / "latents" / "denoiser").sizes
    assert {tuple(size) for size in sizes} == {(2, 4, 4), (2, 2, 2), (1, 4, 4)}
    assert len(json.loads((trained / "labels.json").read_text())) == 72


def test_killed_it_goes_on_to_the_last_bit(flag, trained, tmp_path, cache):
    process = commands.start(flag, f"--workdir={tmp_path}", cache=cache)
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= 4 + 6):
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = commands.run(flag, f"--workdir={tmp_path}", cache=cache)
    assert code == 0, err
    assert commands.losses(tmp_path) == commands.losses(trained)


def test_classes_are_sampled_by_their_names_only(trained, tmp_path, cache):
    out = f"--out={tmp_path}"
    prompts = ["--prompt=a red circle moving left"]
    code, _, err = commands.run(f"--workdir={trained}", "--mode=sample", *prompts, out, cache=cache)
    assert code == 0, err
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 1
    code, _, err = commands.run(f"--workdir={trained}", "--mode=sample", "--prompt=a dog", out, cache=cache)
    assert code == 1 and "Traceback" not in err
    assert "'a dog' is not one of the 72 classes" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("knob", "phrases"),
    [
        ("denoiser.windows=((1, None, None), (None, 3, 2))", ["(None, 3, 2)", "does not divide", "(2, 4, 4)"]),
        ("stages.denoiser.pack.tokens=31", ["stages.denoiser.shapes.clip", "32 tokens", "31", "raise"]),
        ("data.height=18", ["18"]),
        ("denoiser.patch_size=(1, 3, 1)", ["patch_size (1, 3, 1)", "(2, 4, 4)"]),
        ("diffusion.parameterization=eps", ["'eps'", "zero_terminal_snr"]),
        ("conditioning.frames=(2,)", ["conditioning.frames (2,)", "2 latent frames"]),
        ("denoiser.cross_attention=True", ["text", "cross_attention"]),
        ("diffusion.adaptive=1.0", ["adaptive", "packs"]),
    ],
)
def test_what_does_not_fit_is_said_at_the_start(knob, phrases, flag, tmp_path, cache):
    code, _, err = commands.run(flag, f"--workdir={tmp_path / 'run'}", f"--config.{knob}", cache=cache)
    assert code == 1 and "Traceback" not in err
    assert all(phrase in err.splitlines()[-1] for phrase in phrases), err
