"""V-JEPA with random weights against the package vjepa, and JEDi of two folders of videos."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError
from walt_jax.evaluation import distances, evaluate_files, jedi, vjepa
from walt_jax.evaluation.kernel_distance import kernel_distance

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script(golden_script):
    return golden_script("make_vjepa")


@pytest.fixture(scope="module")
def answers():
    return load_file(GOLDEN / "vjepa.safetensors")


def test_features_are_those_of_the_package(script, answers):
    network = vjepa.weights_from(script.random_state(), "w", script.WIDTH, script.LAYERS)
    found = jax.jit(functools.partial(vjepa.features, heads=script.HEADS))(network, script.clips())
    np.testing.assert_allclose(found, answers["features"], atol=1e-4)


def test_distance_is_jedis(answers):
    features = answers["features"]
    found = jedi.jedi(features[:2], features[2:], "here", "", {})
    assert found["value"] == pytest.approx(answers["jedi"][0], rel=1e-6)
    assert "fewer give more" in found["protocol"]


def test_folders_of_videos(script, tmp_path, monkeypatch):
    """The command, with the small network in place of ViT-H."""
    state = script.random_state()
    patches = state["target_encoder.module.backbone.pos_embed"]
    state["target_encoder.module.backbone.pos_embed"] = np.repeat(patches, 4, axis=1)  # 16 frames
    files = [{}, {}]
    for name, value in state.items():
        files[name.startswith("classifier.")][name] = value
    folder = tmp_path / "vjepa"
    folder.mkdir()
    for name, tensors in zip(vjepa.FILES, files, strict=True):
        save_file(tensors, folder / name)
    small = functools.partial(vjepa.weights_from, width=script.WIDTH, layers=script.LAYERS)
    monkeypatch.setattr(vjepa, "weights_from", small)
    monkeypatch.setattr(vjepa, "features", functools.partial(vjepa.features, heads=script.HEADS))
    monkeypatch.setattr(vjepa, "FEATURES", script.WIDTH)
    monkeypatch.setattr(vjepa, "SIDE", script.SIDE)
    rng = np.random.default_rng(0)
    for name in ("videos", "reference"):
        (tmp_path / name).mkdir()
        for number, clip in enumerate(rng.integers(0, 256, (3, 16, 32, 32, 3), np.uint8)):
            write_video(tmp_path / name / f"{name}{number}.mp4", clip, 8)  # no pairs
    what = tmp_path / "videos", tmp_path / "reference", tmp_path / "out", ("jedi",)
    report = evaluate_files.evaluate_files(*what, weights={"vjepa": str(folder)})
    [metric] = [one for one in report["metrics"] if one["name"] == "jedi"]
    assert (metric["count"], metric["reference_count"], metric["frames"]) == (3, 3, 16)
    assert not [one for one in report["metrics"] if one["name"].startswith(("fvd", "kvd", "frechet"))]
    detector = distances.choose(("jedi",), {"vjepa": str(folder)}, images=False)[0][0]
    clips = ([read_clip(path) for path in sorted(folder.iterdir())] for folder in what[:2])
    rows = [np.concatenate([detector.compute(jedi.prepare(clip)[None]) for clip in some]) for some in clips]
    expected = 100 * kernel_distance(*rows, degree=2, coefficient=0.0, biased=True)
    assert metric["value"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="needs V-JEPA's weights"):
        distances.choose(("jedi",), {}, images=False)


def test_other_weights_are_named(script):
    with pytest.raises(UserError, match="they are not V-JEPA's"):
        vjepa.weights_from({}, "w")
    with pytest.raises(UserError, match=r"hold patch_embed.proj.weight of shape \[48, 3, 2, 16, 16\]"):
        vjepa.weights_from(script.random_state(), "w")
