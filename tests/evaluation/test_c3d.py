"""C3D with random weights against PyTorch's, and the inception score of a folder of videos."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from walt_jax.data.media import write_video
from walt_jax.errors import UserError
from walt_jax.evaluation import c3d, evaluate_files, sample_scores, video_inception_score
from walt_jax.evaluation.inception_score import inception_score

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script(golden_script):
    return golden_script("make_c3d")


@pytest.fixture
def small(script, tmp_path, monkeypatch):
    """A folder with TGANv2's two files, of a network of 4 channels."""
    folder = tmp_path / "c3d"
    folder.mkdir()
    state = script.random_state(4)
    np.savez(folder / "mean2.npz", mean=state.pop("mean"))
    np.savez(folder / "conv3d_deepnetA_ucf.npz", **state)
    monkeypatch.setattr(c3d, "weights_from", functools.partial(c3d.weights_from, width=4))
    return folder


@pytest.mark.parametrize("width", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_equals_pytorchs(script, width):
    expected = load_file(GOLDEN / "c3d.safetensors")[f"logits_{width}"]
    weights = c3d.weights_from(script.random_state(width), "w.npz", width)
    clip = video_inception_score.prepare(script.clip())
    logits = np.asarray(jax.jit(c3d.logits)(weights, clip[None]))
    np.testing.assert_allclose(logits / expected.std(), expected / expected.std(), atol=1e-4)


def test_score_of_videos_and_of_samples(script, small, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clips = [np.roll(script.clip()[:, :16, :16], 5 * number, axis=3 - number % 2) for number in range(10)]
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:02d}.mp4", clip, 8)
    weights = {"c3d": str(small)}
    report = evaluate_files.evaluate_files(folder, None, tmp_path / "out", weights=weights)
    [metric] = [one for one in report["metrics"] if one["name"] == "inception_score_c3d"]
    assert (metric["count"], metric["frames"]) == (10, 16) and metric["value"] == pytest.approx(
        1
    )  # of parts of one video

    [of_arrays] = sample_scores.sample_scores([np.concatenate([c, c[:1]]) for c in clips], [""] * 10, weights)
    detector = video_inception_score.find_c3d(weights)
    logits = np.concatenate([detector.compute(video_inception_score.prepare(clip)[None]) for clip in clips])
    assert of_arrays["value"] == pytest.approx(inception_score(logits)[0], rel=1e-4)
    assert sample_scores.sample_scores([clip[:9] for clip in clips], [""] * 10, weights) == []  # too short


def test_other_numbers_of_frames_leave_the_other_metrics(script, small, tmp_path, monkeypatch, capsys):
    """Of longer clips the first 16 frames are scored; of shorter ones none, and a sentence says so."""
    monkeypatch.setattr(video_inception_score, "SPLITS", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    clip = np.repeat(script.clip()[:, :16, :16], 2, axis=0)[:18]
    for number in range(2):
        write_video(folder / f"{number}.mp4", np.roll(clip, 5 * number, axis=2), 8)

    def scores(frames):
        found = evaluate_files.evaluate_files(
            folder, None, tmp_path / "out", weights={"c3d": str(small)}, frames=frames
        )
        named = {one["name"]: one for one in found["metrics"]}
        assert named["flicker"]["frames"] == frames
        return named.get("inception_score_c3d")

    usual, longer = scores(16), scores(18)
    assert longer["value"] == usual["value"] and longer["frames"] == 16
    assert longer["cut"] == "the first 16 of 18 frames of each clip, every frame"
    assert "left out" not in capsys.readouterr().err
    assert scores(9) is None
    assert "inception_score_c3d is left out: --num_frames=9 is too short" in capsys.readouterr().err


def test_other_weights_are_named(script):
    with pytest.raises(UserError, match="lack 'mean', so they are not C3D's"):
        c3d.weights_from({}, "w.npz")
    with pytest.raises(UserError, match=r"hold conv1a/W of shape \[4, 3, 3, 3, 3\]"):
        c3d.weights_from(script.random_state(4), "w.npz")
