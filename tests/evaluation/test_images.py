"""FID, KID and inception scores: resizing and metrics against the published packages; folders of pictures; frames."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError
from walt_jax.evaluation import distances, video_quality
from walt_jax.evaluation import evaluate_files as module
from walt_jax.evaluation.evaluate_files import evaluate_files
from walt_jax.evaluation.features import Detector
from walt_jax.evaluation.frechet import frechet_distance, moments
from walt_jax.evaluation.image_protocols import IMAGE_PROTOCOLS
from walt_jax.evaluation.inception_score import inception_score
from walt_jax.evaluation.kernel_distance import kernel_distance, subset_kernel_distance

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script(golden_script):
    return golden_script("make_fid")


@pytest.fixture(scope="module")
def answers():
    return load_file(GOLDEN / "fid.safetensors")


@pytest.mark.parametrize("name", IMAGE_PROTOCOLS)
def test_resizing_is_that_of_each_package(script, answers, name):
    found = IMAGE_PROTOCOLS[name].prepare(script.images())
    assert found.shape == (2, 299, 299, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, :: script.EVERY, :: script.EVERY], answers[name], atol=1e-5)


def test_metrics_are_torch_fidelitys(script, answers):
    one, other, logits = script.features()
    found = frechet_distance(moments(one, 1), moments(other, 1))
    assert found == pytest.approx(answers["frechet_inception_distance"][0], rel=1e-6)
    kid = answers["kernel_inception_distance_mean"][0]  # in float32 there
    assert kernel_distance(one, other) == pytest.approx(kid, rel=1e-5)
    assert subset_kernel_distance(one, other, 2, 50)[0] == pytest.approx(kid, rel=1e-5)
    mean, std = inception_score(logits, 10)
    assert mean == pytest.approx(answers["inception_score_mean"][0], rel=1e-6)
    assert std == pytest.approx(answers["inception_score_std"][0], rel=1e-5)


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    for each in (module, distances):
        monkeypatch.setattr(each, "find_weights", lambda network, given: given.get(network))
    monkeypatch.setattr(video_quality, "optical_flow", lambda one, other: np.zeros((2, *one.shape)))


def means(path):
    """A network whose features are the mean colour, with logits of as many classes after them."""

    def compute(images):
        colour = images.mean(axis=(1, 2, 3))
        return jnp.concatenate([colour, 3 * colour[:, ::-1]], axis=-1)

    assert path == "w.pth"
    return Detector("mean colours", "0" * 64, 3, 1, jax.jit(compute))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of 12 pictures of several sizes, with equal names."""
    base, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for folder in ("videos", "reference"):
        (base / folder).mkdir()
        for number in range(12):
            colour = rng.integers(0, 256, (1, 1, 3))
            noise = rng.integers(0, 256, (20 + number, 24, 3))
            Image.fromarray(((colour + noise) // 2).astype(np.uint8)).save(base / folder / f"{number}.png")
    return base


def by_name(report):
    return {metric["name"]: metric for metric in report["metrics"]}


def test_folders_of_pictures_are_measured_as_images(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(distances.DETECTORS, "inception", means)
    videos, reference = pictures / "videos", pictures / "reference"
    report = evaluate_files(videos, reference, tmp_path, ["fid_clean"], {"inception": "w.pth"})
    found = by_name(report)
    assert {"fid_clean", "kid_clean", "inception_score_clean", "psnr_db", "ssim"} == set(found)

    def features(folder):
        names = [f"{number}.png" for number in range(12)]
        read = [IMAGE_PROTOCOLS["fid_clean"].prepare(read_clip(folder / name)) for name in names]
        return np.stack([prepared.mean(axis=(0, 1, 2)) for prepared in read])

    one, other = features(videos), features(reference)
    expected = frechet_distance(moments(one, 1), moments(other, 1))
    assert found["fid_clean"]["value"] == pytest.approx(expected, rel=1e-3)
    assert found["kid_clean"]["value"] == pytest.approx(kernel_distance(one, other), rel=1e-3, abs=1e-5)
    assert found["inception_score_clean"]["value"] == pytest.approx(inception_score(3 * one[:, ::-1])[0], rel=0.1)
    assert "fewer than 1000" in found["kid_clean"]["protocol"]
    assert found["fid_clean"]["frames"] == 1 and "12 images against 12, whole" in found["fid_clean"]["protocol"]
    # Without weights a stand-in, which is not FID.
    names = set(by_name(evaluate_files(videos, reference, tmp_path)))
    assert {"frechet_random_image_features", "kernel_random_image_features"} < names
    assert not any("fid" in name or "inception" in name for name in names)


def test_frames_of_videos_are_images_where_a_protocol_is_of_images(tmp_path, monkeypatch):
    monkeypatch.setitem(distances.DETECTORS, "inception", means)
    for seed, name in enumerate(("videos", "reference")):
        (tmp_path / name).mkdir()
        for number in range(3):
            clip = draw(COMBINATIONS[number], np.random.default_rng([seed, number]), 6, 16)
            write_video(tmp_path / name / f"{seed}{number}.mp4", clip, 8)
    folders, weights = (tmp_path / "videos", tmp_path / "reference"), {"inception": "w.pth"}
    found = by_name(evaluate_files(*folders, tmp_path / "a", ["fid_tf1"], weights, frames=4))["fid_tf1"]
    assert (found["count"], found["reference_count"], found["frames"]) == (12, 12, 4)
    assert "12 images against 12, each alone, the first 4 frames of each clip" in found["protocol"]


def test_mistakes_are_one_sentence(pictures, tmp_path):
    videos, reference = pictures / "videos", pictures / "reference"
    for options, words in (
        ({"protocols": ["fid_tf1"]}, "fid_tf1 needs Inception's weights, which no package ships"),
        ({"protocols": ["fvd_tf1"]}, "fvd_tf1 is for videos, and the folders hold pictures"),
        ({"frames": 16}, "--num_frames=16 is for videos, and the folders hold pictures"),
        ({"protocols": ["fid"]}, "no protocol 'fid'"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate_files(videos, reference, tmp_path, **options)
