"""A mistake is one clear sentence, exit code 1, no traceback, and nothing is overwritten."""

import json
import pathlib

import commands
import numpy as np
import pytest

from walt_jax import main
from walt_jax.config import build, plain
from walt_jax.config_file import with_config_path
from walt_jax.data.limits import DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.training.run_config import RunConfig
from walt_jax.workdir import locked

TINY = f"--config={commands.ROOT / 'configs' / 'walt_tiny.py'}"
DIT = f"--config={commands.ROOT / 'configs' / 'dit_s_2.py'}"
CLIPS = f"--config={commands.ROOT / 'configs' / 'walt_clips.py'}"


def sentence(capsys, *flags) -> str:
    """Runs a command that fails; returns what it says."""
    assert main.main(list(flags)) == 1
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in captured.err
    return message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--confg=x"], ["confg", "config"]),
        ([TINY], ["--workdir"]),
        ([TINY, "--workdir=W", "--mode=trian"], ["mode", "train"]),
        ([TINY, "--workdir=W", "train"], ["'train'"]),
        ([TINY, "--workdir=W", "--mode=plan", "--auto_mesh"], ["--auto_mesh is for --mode=train"]),
        (["--config=configs/none.py", "--workdir=W"], ["none.py"]),
        (["--config=walt_none", "--workdir=W"], ["walt_none", "walt_demo", "path of a file"]),
        (["--workdir=W"], ["--config"]),
        (
            ["--config.seed=1", "--workdir=W"],
            ["--config.seed=1 sets", "--config is missing", "--config=configs/walt_demo.py", "--workdir=DIR"],
        ),
        ([TINY, "--workdir=W", "--config.data.limits.pixels.x=1"], ["pixels"]),
        ([TINY, "--workdir=W", "--config.data.widht=3"], ["widht", "width"]),
        ([TINY, "--workdir=W", "--config.data.limits.pixel=3"], ["config.data.limits.pixel", "pixels"]),
        ([TINY, "--workdir=W", "--config.data.captions=3"], ["config.data.captions is 3", "str"]),
        ([TINY, "--workdir=W", "--config.data.source=drawn*0"], ["'drawn*0'", "weight above 0"]),
        ([TINY, "--workdir=W", "--config.conditioning.low_res_noise=0.5"], ["low_res_noise", "denoiser.upscale"]),
        ([TINY, "--workdir=W", "--config.data.width=wide"], ["config.data.width", "wide"]),
        ([TINY, "--workdir=W", "--config.data.width=24"], ["config.data", "width=24"]),
        ([TINY, "--workdir=W", "--config.data.frames=6"], ["frames", "1 + 4n"]),
        ([TINY, "--workdir=W", "--config.stages.denoiser.optimizer.name=adan"], ["adan", "adamw"]),
        ([TINY, "--workdir=W", "--config.diffusion.schedule.name=lineal"], ["lineal", "linear"]),
        ([TINY, "--workdir=W", "--config.denoiser.windows=((None, 3, 3),)"], ["window", "(None, 3, 3)"]),
        ([TINY, "--workdir=W", "--config.tokenizer.norm_groups=3"], ["norm_groups=3"]),
        ([CLIPS, "--workdir=W"], ["config.data.source"]),
        ([CLIPS, "--workdir=W", "--config.data.source=nowhere"], ["nowhere"]),
        ([TINY, "--workdir=W", "--mode=sample", "--prompt=a"], ["W", "--mode=train"]),
        ([TINY, "--workdir=W", "--mode=sample"], ["--prompt"]),
        ([TINY, "--workdir=W", "--mode=sample", "--prompts=none.txt"], ["none.txt"]),
        ([TINY, "--workdir=W", "--mode=sample", "--prompt=a", "--num_samples=0"], ["num_samples"]),
        ([TINY, "--workdir=W", "--mode=evaluate"], ["W", "--mode=train"]),
        ([TINY, "--workdir=W", "--mode=encode"], ["W holds no run", "--workdir"]),
        ([TINY, "--workdir=W", "--mode=export"], ["--out=FOLDER", "--out=FILE.safetensors"]),
        ([TINY, "--workdir=W", "--mode=export", "--out=new"], ["W", "--mode=train"]),
        ([TINY, "--workdir=W", "--mode=export", "--out=new", "--format=pickle"], ["pickle", "safetensors"]),
        ([TINY, "--workdir=W", "--mode=export", "--out=x.safetensors"], ["W", "--mode=train"]),
        ([TINY, "--workdir=W", "--config.tokenizer_from=nowhere"], ["nowhere", "--workdir"]),
        ([TINY, "--workdir=W", "--config.init_from=nowhere"], ["config.init_from", "nowhere", "--workdir"]),
        ([TINY, "--workdir=W", "--config.tokenizer_from=none.safetensors"], ["none.safetensors", "can't be read"]),
        (
            [DIT, "--workdir=W", "--config.data.source=drawn", "--config.init_from=none.safetensors"],
            ["none.safetensors"],
        ),
        ([TINY, "--workdir=W", "--config.stages.denoiser.latents=nowhere"], ["nowhere", "--mode=encode"]),
        ([TINY, "--workdir=W", "--config.stages.tokenizer.latents=x"], ["latents", "denoiser stages"]),
        ([TINY, "--workdir=W", "--config.denoiser.block=gpt"], ["config.denoiser.block", "'gpt'", "walt or dit"]),
        ([TINY, "--workdir=W", "--config.sampling.guidance.channels=99"], ["channels", "12"]),
        ([TINY, "--workdir=W", "--config.diffusion.multiscale=3"], ["multiscale=3", "4 × 4"]),
        (
            ["--config=walt_packed", "--workdir=W", "--config.stages.denoiser.motion.smoothness=1.0"],
            ["stages.denoiser.motion", "packs"],
        ),
        ([TINY, "--workdir=W", "--config.stages.denoiser.accumulate=3"], ["accumulate=3", "batches of 4 clips"]),
        ([TINY, "--workdir=W", "--profile_steps=5"], ["--profile_steps=5", "--profile_steps=10:15"]),
        ([TINY, "--workdir=s3://bucket/run"], ["s3://bucket/run", "local folders and on gs://"]),
        ([TINY, "--workdir=W", "--config.stages.denoisr.steps=3"], ["denoisr", "tokenizer, denoiser"]),
        ([TINY, "--workdir=W", "--mode=sample", "--prompt=" + "a" * 10_001], ["10,001 characters", "shorten"]),
        ([TINY, "--workdir=W", "--config.denoiser.dim=196608"], ["Stage denoiser can't fit", "parameters", "GB"]),
        ([TINY, "--workdir=W", "--config.tokenizer.base_channels=65536"], ["Stage tokenizer can't fit", "GB"]),
    ],
)
def test_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = sentence(capsys, *flags)
    for word in words:
        assert word in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_knob_that_the_file_leaves_out_can_be_set():
    values = main.parse(
        [TINY, "--config.data.captions=label*2", "--config.data.limits.pixels=9", "--config.data.fps=4", "--mode=plan"]
    )
    config = build(RunConfig, values.config.to_dict(), "config")
    assert (config.data.captions, config.data.limits.pixels, config.data.fps) == ("label*2", 9, 4.0)
    assert config.data.limits.longest_side == DecodeLimits().longest_side
    assert values.mode == "plan"


def test_without_a_config_a_knob_is_one_of_the_runs(tmp_path, capsys):
    """All but the mesh, which is of the devices that trained it."""
    knobs = plain(main.parse([TINY, "--config.mesh.data=2"]).config, "config")
    (tmp_path / "config.json").write_text(json.dumps(knobs))
    asked = ["--config.sampling.steps=3", "--config.data.captions=label*2", "--config.data.limits.pixels=9"]
    found = plain(main.parse([f"--workdir={tmp_path}", *asked]).config, "config")
    expected = plain(main.parse([TINY, *asked]).config, "config")
    expected.pop("mesh", None)
    assert found == json.loads(json.dumps(expected))
    for flag, words in (
        ("--config.data.widht=3", "config.data.widht is read by nothing; did you mean 'width'?"),
        ("--config.seed", "--config.seed has no value"),
        ("--config.seed.x=1", "seed is a knob, not a group of them"),
        ("--config.stages.x.steps=1", "names no stage of the config; its stages are "),
    ):
        assert words in sentence(capsys, "--mode=plan", f"--workdir={tmp_path}", flag)


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch):
    """From any folder; a file of that name in it precedes."""
    monkeypatch.chdir(tmp_path)
    by_path = main.parse([TINY, "--config.data.fps=4"]).config
    assert main.parse(["--config=walt_tiny", "--config.data.fps=4"]).config == by_path
    heads = [main.parse([f"--config=tokenizer_clips:{head}"]).config.tokenizer.head.name for head in ("fsq", "vq")]
    assert heads == ["fsq", "vq"]
    (tmp_path / "walt_tiny").write_text("")
    assert with_config_path("--config=walt_tiny") == "--config=walt_tiny"
    assert with_config_path("--mode=walt_tiny") == "--mode=walt_tiny"


def test_a_knob_that_nothing_reads(tmp_path, capsys):
    config = tmp_path / "odd.py"
    config.write_text(
        "import runpy\n"
        "def get_config():\n"
        f"    config = runpy.run_path({str(commands.ROOT / 'configs' / 'walt_tiny.py')!r})['get_config']()\n"
        "    config.denoiser.mlp_ration = 4\n"
        "    return config\n"
    )
    message = sentence(capsys, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert "config.denoiser.mlp_ration" in message and "mlp_ratio" in message


def test_an_unreadable_video(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_video(folder / "good.mp4", np.zeros((20, 48, 80, 3), np.uint8), 8)
    (folder / "bad.mp4").write_text("<html>404</html>")
    message = sentence(capsys, CLIPS, f"--config.data.source={folder}", f"--workdir={tmp_path / 'run'}")
    assert "bad.mp4" in message and "max_bad_fraction" in message


def snapshot(folder: pathlib.Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", [{"notes.txt": b"mine"}, {"metrics.jsonl": b"{}\n"}])
def test_a_folder_that_is_no_run_is_left_alone(content, tmp_path, capsys):
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    message = sentence(capsys, TINY, f"--workdir={tmp_path}")
    assert str(tmp_path) in message
    assert {path.name: text for path, text in snapshot(tmp_path).items() if path.name != "lock"} == content


def test_a_second_process_is_refused(tmp_path, capsys):
    with locked(tmp_path):
        assert "Another process" in sentence(capsys, TINY, f"--workdir={tmp_path}")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, capsys):
    """And so does a workdir that is used with another config."""
    explode = "--config.stages.tokenizer.optimizer.learning_rate=1e30"
    flags = [TINY, f"--workdir={tmp_path}", explode, "--config.stages.tokenizer.optimizer.warmup_steps=20"]
    flags += ["--config.stages.tokenizer.checkpoint_every=1"]
    message = sentence(capsys, *flags)
    assert "tokenizer" in message and "checkpoint" in message
    kept = [int(path.name) for path in (tmp_path / "checkpoints" / "tokenizer").iterdir() if path.name.isdigit()]
    stopped = int(message.split("at step ")[1].split(",")[0])
    assert kept and max(kept) == stopped - 1

    before = snapshot(tmp_path)
    message = sentence(capsys, TINY, f"--workdir={tmp_path}")
    assert "warmup_steps is 20 there and 50 here" in message or "1e+30" in message
    assert snapshot(tmp_path) == before


def test_help_tells_of_every_mode_and_flag(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for mode, function in main.RUN.items():
        assert f"  {mode:14} {function.__doc__[:20]}" in text
    for flag in ("config", "workdir", "mode", "prompt", "out", "seed", "clips", "gif"):
        assert f"--{flag} " in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_config_of_values_that_are_no_json(tmp_path, capsys):
    """Paths and NumPy's numbers are taken as what they say; what has no such form is a sentence."""
    source = f"""
import pathlib, sys
import numpy as np
sys.path.insert(0, {str(commands.ROOT / "configs")!r})
from walt_tiny import get_config as tiny

def get_config():
    config = tiny()
    with config.ignore_type():
        KNOB
    return config
"""
    for number, (knob, words) in enumerate(
        [
            (
                "config.seed = np.int64(3); config.data.source = pathlib.Path('nowhere')",
                "no data folder nowhere",
            ),
            ("config.seed = lambda: 3", "config.seed is a function"),
            ("config.data.fps = {8}", "config.data.fps is a set"),
        ]
    ):
        path = tmp_path / f"mine{number}.py"
        path.write_text(source.replace("KNOB", knob))
        assert words in sentence(capsys, f"--config={path}", f"--workdir={tmp_path / 'W'}")


def test_a_workdir_whose_config_is_nested_too_deep(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json can't be read" in sentence(capsys, f"--workdir={tmp_path}", "--mode=plan")
