"""What is exported and read back is what was trained, to the last bit, with and without this project's code."""

import json
import pathlib
import pickle
import re
import subprocess
import sys

import commands
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from jax import export as programs
from safetensors.numpy import load_file

import walt_jax
from walt_jax import main
from walt_jax.api import TrainedModel, Video
from walt_jax.config import build
from walt_jax.data.media import write_video
from walt_jax.errors import UserError
from walt_jax.export.contents import contents
from walt_jax.export.export import export
from walt_jax.generation.request import Request
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig

PROMPT = "a blue square moving up"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tiny_run) -> TrainedModel:
    return walt_jax.load(tiny_run)


@pytest.fixture(scope="module")
def run(tiny_run) -> Run:
    return Run(build(RunConfig, json.loads((tiny_run / "config.json").read_text()), "config"), tiny_run)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("safetensors", "orbax", "stablehlo"):
        assert str(folder / kind) in export(run, kind, folder / kind)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def video(model) -> Video:
    return model.sample(PROMPT, seed=1)


@pytest.fixture(scope="module")
def tensors(run) -> dict[str, np.ndarray]:
    return contents(run, "safetensors").tensors


@pytest.mark.parametrize("kind", ["safetensors", "orbax", "stablehlo"])
def test_a_round_trip(kind, exported, model, video, monkeypatch):
    """Nothing is unpickled on the way."""

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    back = walt_jax.load(exported[kind])
    monkeypatch.undo()
    assert (back.sample(PROMPT, seed=1) == video).all()
    assert (back.reconstruct(video) == model.reconstruct(video)).all()
    latents = back.encode(video)
    assert (latents == model.encode(video)).all() and (back.decode(latents) == model.decode(latents)).all()


def test_a_video_is_that_of_the_command_line(model, run, video):
    """An array with its frame rate, which a notebook shows."""
    assert isinstance(video, np.ndarray) and video.shape == (5, 16, 16, 3) and video.dtype == np.uint8
    clips = run.generator().generate([Request(PROMPT, 1), Request("a red circle moving left", 2)])
    assert (clips[0] == video).all()
    several = model.sample([PROMPT, "a red circle moving left"], seed=[1, 2])
    assert several.shape == (2, 5, 16, 16, 3) and (several == clips).all()
    assert video.fps == several.fps == (video + 0).fps == 8
    assert video._repr_html_().count("<video") == 1 and several._repr_html_().count("<video") == 2
    assert video[..., 0]._repr_html_() is None and (video / 2)._repr_html_() is None


def test_files_and_arrays_are_read(model, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (7, 18, 20, 3), np.uint8)
    write_video(tmp_path / "in.mp4", frames, 5)
    there = model.reconstruct(tmp_path / "in.mp4")
    assert there.shape == frames.shape and there.fps == 5
    for wrong in (frames[0], frames.astype(np.float32), frames[:0]):
        with pytest.raises(UserError, match="uint8"):
            model.reconstruct(wrong)
    with pytest.raises(UserError, match="1 \\+ 4n"):
        model.encode(frames)
    with pytest.raises(UserError, match=r"none\.mp4"):
        model.reconstruct(tmp_path / "none.mp4")
    with pytest.raises(UserError, match=r"\[t, h, w, 12\]"):
        model.decode(np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match="2 prompts and 3 seeds"):
        model.sample(["a", "b"], seed=[1, 2, 3])
    for name, value in {
        "prompt": 3, "seed": -1, "conditions": ["a.png"], "extend": "up", "steps": 0, "height": "high",
        "guidance": "high",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"^{name}=.* can't be taken; give "):
            model.sample(**{name: value})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name another folder"):
        model.evaluate(tmp_path / "file")


@pytest.mark.slow
def test_evaluate_measures_what_training_did(exported, tiny_run):
    """Of an export, and within the rounding of programs that are compiled with fewer optimizations."""
    wanted = json.loads((tiny_run / "evaluate.json").read_text())["metrics"]
    found = walt_jax.load(exported["safetensors"]).evaluate()
    assert [metric["name"] for metric in found] == [metric["name"] for metric in wanted]
    for metric, other in zip(found, wanted, strict=True):
        assert metric["value"] == pytest.approx(other["value"], rel=1e-2, abs=0.05)


def test_orbax_loads_without_the_project(exported, tensors):
    restored = flatten_dict(ocp.StandardCheckpointer().restore(exported["orbax"] / "params"), sep="/")
    assert restored.keys() == tensors.keys()
    assert all((np.asarray(restored[name]) == tensors[name]).all() for name in tensors)


def test_a_program_without_the_project_samples_the_same_video(exported, run, video, tmp_path):
    """The one in the documentation, in a process that can't import walt_jax."""
    text = (commands.ROOT / "docs" / "export.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 20 and "walt_jax" not in program
    program = program.replace("25 + 1", f"{run.config.sampling.steps} + 1")
    (tmp_path / "program.py").write_text("import sys\n\nsys.modules['walt_jax'] = None\n" + program)
    command = [sys.executable, "program.py", exported["stablehlo"], PROMPT, "video.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = np.load(tmp_path / "video.npy").astype(int)
    # Other programs compute it, so that values which lie between two integers may be rounded to either.
    assert there.shape == video.shape and np.abs(there - np.asarray(video)).max() <= 1


def test_exported_chunks_are_the_whole_clip(exported, model):
    """Of a batch of any size; the slow twin encodes all frames at once."""
    folder = exported["stablehlo"]
    weights = load_file(folder / "model.safetensors")
    read = {path.stem: programs.deserialize(path.read_bytes()) for path in folder.glob("*.jaxexport")}
    assert set(read) == {"encode_first", "encode_next", "decode_first", "decode_next", "step"}
    assert all(program.platforms == ("cpu", "cuda", "tpu") for program in read.values())
    clips = np.random.default_rng(0).integers(0, 255, (3, 13, 16, 16, 3), np.uint8)
    latents, cache = read["encode_first"].call(weights, clips[:, :5])
    pixels, memory = read["decode_first"].call(weights, latents)
    parts = [(latents, pixels)]
    for start in (5, 9):
        latents, cache = read["encode_next"].call(weights, clips[:, start : start + 4], cache)
        pixels, memory = read["decode_next"].call(weights, latents, memory)
        parts.append((latents, pixels))
    whole = np.stack([model.encode(clip) for clip in clips])
    latents, pixels = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    np.testing.assert_allclose(latents, whole, atol=1e-4)
    decoded = np.stack([model.decode(z) for z in whole]).astype(int)
    assert np.abs(pixels - decoded).max() <= 1


def test_the_card_says_what_the_run_was(exported, tiny_run):
    card = (exported["safetensors"] / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: apache-2.0\n" in front and "pipeline_tag: text-to-video\n" in front and "- walt\n" in front
    assert "Clips of `drawn`" in card and "| denoiser | denoiser | 30 | 30 | 4 clips |" in card
    for metric in json.loads((tiny_run / "evaluate.json").read_text())["metrics"]:
        assert f"| {metric['name']} | {metric['value']:.4g} {metric['unit']} |" in card


def test_a_folder_that_exists_is_kept(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    flags = [f"--workdir={run.workdir}", "--mode=export"]
    assert main.main([*flags, f"--out={tmp_path / 'mine'}"]) == 1
    assert "exists; name a folder that does not" in capsys.readouterr().err
    assert main.main([*flags, "--format=diffusers", f"--out={tmp_path / 'new'}"]) == 1
    assert "Latte" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_parameter_of_another_model(exported, tmp_path):
    """The config decides on names and shapes."""
    folder = exported["safetensors"]
    config = json.loads((folder / "config.json").read_text())
    config["config"]["denoiser"]["mlp_ratio"] = 2.0
    for name in ("model.safetensors", "vocabulary.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="restore both from one export"):
        walt_jax.load(tmp_path)


def test_a_build_has_the_configs(tmp_path):
    """As a wheel has them: in the package."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(build, cwd=commands.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = {path.name for path in (tmp_path / "walt_jax" / "configs").glob("*.py")}
    assert there == {path.name for path in (commands.ROOT / "configs").glob("*.py")}
    assert not (tmp_path / "configs").exists() and not (tmp_path / "tests").exists()
