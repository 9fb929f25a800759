"""`--mode=evaluate --videos --reference`: numbers, pairs, skips, resuming and mistakes, with the stand-in network."""

import json
import shutil

import jax
import numpy as np
import pytest
from scipy.linalg import sqrtm

from walt_jax import main
from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.evaluation import distances, random_features, video_quality
from walt_jax.evaluation import evaluate_files as module
from walt_jax.evaluation.detector_weights import weights_of
from walt_jax.evaluation.evaluate_files import evaluate_files
from walt_jax.evaluation.features import BATCH, FeatureCache
from walt_jax.evaluation.fvd_protocols import FVD_PROTOCOLS
from walt_jax.evaluation.reconstruction import psnr_db, ssim

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = ("0.mp4", "1.mp4", "2.gif")


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    for each in (module, distances):
        monkeypatch.setattr(each, "find_weights", lambda network, given: None)


@pytest.fixture(autouse=True)
def quick_flow(monkeypatch):
    """The flow, which takes most of the time, has its own tests."""
    monkeypatch.setattr(video_quality, "optical_flow", lambda one, other: np.zeros((2, *one.shape)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of three videos of 17 frames, 32 × 32, with equal names."""
    base = tmp_path_factory.mktemp("files")
    for seed, folder in enumerate(("videos", "reference")):
        (base / folder).mkdir()
        for index, name in enumerate(NAMES):
            clip = draw(COMBINATIONS[index], np.random.default_rng([seed, index]), 17, 32)
            write_video(base / folder / name, clip, 8)
    return base


@pytest.fixture
def copied(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "in")
    return tmp_path / "in"


def by_name(report):
    return {metric["name"]: metric for metric in report["metrics"]}


def direct(folder, frames=16):
    """The stand-in's features of each file, one at a time."""
    detector = random_features.random_detector()
    clips = [read_clip(path)[:frames] for path in sorted(folder.iterdir())]
    return np.concatenate([np.asarray(detector.compute(random_features.prepare(clip)[None])) for clip in clips])


def test_equals_the_distances_of_features_computed_one_by_one(folders, tmp_path):
    report = evaluate_files(folders / "videos", folders / "reference", tmp_path)
    assert json.loads((tmp_path / "evaluate.json").read_text()) == report
    found = by_name(report)
    one, other = (direct(folders / name).astype(np.float64) for name in ("videos", "reference"))
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    expected = np.square(one.mean(0) - other.mean(0)).sum() + sum(map(np.trace, covariances))
    expected -= 2 * np.trace(sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(len(covariances[0])))).real
    metric = found["frechet_random_features"]
    assert metric["value"] == pytest.approx(expected, rel=1e-3)
    assert (metric["count"], metric["reference_count"], metric["frames"]) == (3, 3, 16)
    assert metric["cut"] == "the first 16 frames of each clip, every frame; 6 clips are longer"
    assert metric["detector_sha256"] == random_features.random_detector().sha256
    assert "3 samples do not determine" in metric["warning"]
    assert {"kernel_random_features", "flicker", "smoothness", "dynamic_degree", "reference_flicker"} <= set(found)
    assert not any("fvd" in name for name in found), "a stand-in is not FVD"


def test_paired_videos_are_compared_pair_by_pair(folders, tmp_path):
    report = evaluate_files(folders / "videos", folders / "reference", tmp_path)
    clips = [[read_clip(folders / where / name)[:16] for where in ("videos", "reference")] for name in NAMES]
    assert [row["file"] for row in report["pairs"]] == list(NAMES)
    for row, (one, other) in zip(report["pairs"], clips, strict=True):
        assert row["psnr_db"] == pytest.approx(psnr_db(other, one))
        assert row["ssim"] == pytest.approx(ssim(other, one))
    assert by_name(report)["psnr_db"]["value"] == pytest.approx(np.mean([row["psnr_db"] for row in report["pairs"]]))


def test_lpips_of_pairs_where_there_are_weights(folders, tmp_path, monkeypatch):
    """A net that gives the largest difference of two clips stands for LPIPS."""
    (tmp_path / "w").write_bytes(b"weights")
    given = {"lpips_vgg": tmp_path / "w"}
    monkeypatch.setattr(module, "find_weights", lambda network, _: given.get(network))
    monkeypatch.setattr(module, "load_features", lambda path: {})
    monkeypatch.setattr(module, "feature_distance", lambda weights, one, other: jax.numpy.abs(one - other).max()[None])
    report = evaluate_files(folders / "videos", folders / "reference", tmp_path)
    assert "lpips_alex" not in by_name(report)
    clips = [[read_clip(folders / where / name)[:16] for where in ("videos", "reference")] for name in NAMES]
    expected = [np.abs(one / 127.5 - other / 127.5).max() for one, other in clips]
    assert by_name(report)["lpips_vgg"]["value"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert len(by_name(report)["lpips_vgg"]["detector_sha256"]) == 64


def test_other_names_and_other_sizes_are_no_pairs(copied, tmp_path, capsys):
    write_video(copied / "reference" / "1.mp4", np.zeros((17, 32, 48, 3), np.uint8), 8)
    report = evaluate_files(copied / "videos", copied / "reference", tmp_path / "a")
    assert report["pairs"][-1] == {"file": "1.mp4", "reason": "it has 32 × 32 pixels, and its reference 48 × 32"}
    assert by_name(report)["psnr_db"]["count"] == 2
    (copied / "reference" / "1.mp4").rename(copied / "reference" / "other.mp4")
    report = evaluate_files(copied / "videos", copied / "reference", tmp_path / "b")
    assert report["pairs"] == [] and "psnr_db" not in by_name(report)
    assert "2 of 3 videos have the name of a reference" in capsys.readouterr().err


def test_what_can_not_be_measured_is_skipped_with_the_reason(copied, tmp_path):
    (copied / "videos" / "bad.mp4").write_bytes(b"no video")
    write_video(copied / "videos" / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    write_video(copied / "reference" / "short.gif", np.arange(9, dtype=np.uint8).repeat(3072).reshape(9, 32, 32, 3), 8)
    report = evaluate_files(copied / "videos", copied / "reference", tmp_path)
    reasons = {row["file"].removeprefix(f"{copied}/"): row["reason"] for row in report["skipped"]}
    assert set(reasons) == {"videos/bad.mp4", "videos/short.mp4", "reference/short.gif"}
    assert reasons["videos/short.mp4"] == "it has 5 frames, and 16 are measured"
    assert by_name(report)["frechet_random_features"]["count"] == 3
    assert by_name(report)["flicker"]["count"] == 3


def test_without_a_reference_only_the_videos_are_described(folders, tmp_path):
    report = evaluate_files(folders / "videos", None, tmp_path)
    assert set(by_name(report)) == {"flicker", "smoothness", "dynamic_degree"} and report["pairs"] == []


def test_a_stopped_command_resumes_from_the_features_that_it_has(copied, tmp_path, monkeypatch):
    for index in range(BATCH + 1):
        clip = draw(COMBINATIONS[index], np.random.default_rng(index), 16, 32)
        write_video(copied / "videos" / f"more{index}.mp4", clip, 8)
    seen, broken = [], True
    whole = random_features.random_detector

    def counting(images):
        detector = whole(images)

        def compute(batch):
            if broken and seen:
                raise KeyboardInterrupt
            seen.append(len(batch))
            return detector.compute(batch)

        return type(detector)(detector.name, detector.sha256, detector.dimension, detector.shortest, compute)

    monkeypatch.setattr(distances, "random_detector", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_files(copied / "videos", copied / "reference", tmp_path / "out")
    kept = FeatureCache(tmp_path / "out" / "features" / "frechet_random_features")
    assert len(kept.rows) == BATCH * len(jax.local_devices())
    broken = False
    report = evaluate_files(copied / "videos", copied / "reference", tmp_path / "out")
    assert len(seen) == 1 + 1 + 1  # the rest of the videos, and the reference
    assert by_name(report)["frechet_random_features"]["count"] == BATCH + 4
    again = evaluate_files(copied / "videos", copied / "reference", tmp_path / "out")
    assert len(seen) == 3 and again == report
    monkeypatch.setattr(distances, "random_detector", whole)
    assert evaluate_files(copied / "videos", copied / "reference", tmp_path / "new") == report


def test_another_content_under_the_same_name_is_measured_anew(copied, tmp_path):
    before = evaluate_files(copied / "videos", copied / "reference", tmp_path)
    shutil.copy(copied / "reference" / "0.mp4", copied / "videos" / "0.mp4")
    after = evaluate_files(copied / "videos", copied / "reference", tmp_path)
    assert by_name(before)["frechet_random_features"]["value"] != by_name(after)["frechet_random_features"]["value"]
    assert after["pairs"][0]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 1e-10))


def test_a_damaged_cache_is_computed_again(folders, tmp_path):
    before = evaluate_files(folders / "videos", folders / "reference", tmp_path)
    for path in tmp_path.glob("features/*/*.npz"):
        path.write_bytes(path.read_bytes()[:40])
    assert evaluate_files(folders / "videos", folders / "reference", tmp_path) == before


def sentence(capsys, *flags):
    assert main.main(["--mode=evaluate", *map(str, flags)]) == 1
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in captured.err
    return message


def test_the_command_line(folders, tmp_path, capsys):
    flags = [f"--videos={folders / 'videos'}", f"--reference={folders / 'reference'}", f"--out={tmp_path}"]
    assert main.main(["--mode=evaluate", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {tmp_path / 'evaluate.json'}"
    assert any(line.startswith("frechet_random_features") for line in lines)


def test_mistakes_are_one_sentence(folders, copied, tmp_path, capsys):
    videos, reference, out = (
        f"--videos={folders / 'videos'}",
        f"--reference={folders / 'reference'}",
        f"--out={tmp_path / 'out'}",
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no video")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "w.pt").write_bytes(b"nothing")
    cases = [
        (["--videos=nowhere", out], ["--videos=nowhere is not there"]),
        ([f"--videos={folders / 'videos' / '0.mp4'}", out], ["is a file; name a folder"]),
        ([f"--videos={tmp_path / 'empty'}", out], ["holds no videos: name"]),
        ([f"--videos={tmp_path / 'texts'}", out], ["holds no videos; it holds 1 other files"]),
        ([f"--videos={tmp_path / 'broken'}", out], ["None of the 1 files", "a.mp4, for one: not a video"]),
        ([videos, f"--reference={tmp_path / 'empty'}", out], ["--reference=", "holds no videos"]),
        ([videos, f"--reference={folders / 'videos'}", out], ["is the folder of --videos too"]),
        ([videos, reference, out, "--num_frames=40"], ["None of the 3 files", "it has 17 frames, and 40 are measured"]),
        ([videos, reference, out, "--num_frames=2"], ["--num_frames=2 is too few"]),
        ([videos, reference, out, "--protocol=fvd"], ["no protocol 'fvd'; name one of fvd_tf1"]),
        ([videos, reference, out, "--protocol=ucf101_walt"], ["measures a trained run: name its --workdir"]),
        (["--config.evaluation.prompts=8", "--workdir=W"], ["--config.evaluation.prompts=8 sets a knob", "--config="]),
        ([videos, reference, out, "--protocol=fvd_tf1"], ["needs I3D's weights", "walt_jax[metrics]"]),
        ([videos, out, "--protocol=fvd_tf1"], ["--reference=FOLDER"]),
        ([videos, reference, out, "--weights=i3d"], ["NETWORK=FILE"]),
        ([videos, reference, out, "--weights=i4d=x"], ["--weights=i4d=x should be NETWORK=FILE"]),
        ([reference, out, "--workdir=W"], ["--reference is for files; name those to measure with --videos=FOLDER"]),
        (
            [reference, "--protocol=fvd_tf1", "--workdir=W"],
            ["--protocol=fvd_tf1 is for files", "ucf101_walt, k600_walt"],
        ),
        (["--weights=clip=x", "--workdir=W"], ["--weights=clip=… is for files", "i3d and inception"]),
        ([videos, f"--out={tmp_path / 'run'}"], ["holds a run, whose evaluate.json stays"]),
        ([videos], ["--workdir is missing"]),
    ]
    for flags, words in cases:
        message = sentence(capsys, *flags)
        assert all(word in message for word in words), message


def test_weights_flags():
    assert weights_of(["i3d=a=b.pt", "lpips_alex=c"]) == {"i3d": "a=b.pt", "lpips_alex": "c"}


def test_clips_of_fewer_frames_than_the_network_takes(folders, tmp_path, monkeypatch, capsys):
    """A protocol that is named is refused; one that is not is left out, and the other metrics are there."""
    short = random_features.random_detector()
    long = type(short)("I3D", short.sha256, short.dimension, 9, short.compute)
    monkeypatch.setattr(distances, "find_weights", lambda network, given: tmp_path if network == "i3d" else None)
    monkeypatch.setitem(distances.DETECTORS, "i3d", lambda path: long)
    what = folders / "videos", folders / "reference", tmp_path
    with pytest.raises(main.UserError, match="--num_frames=8 is too short: I3D needs 9 frames; give 9"):
        evaluate_files(*what, ("fvd_tf1",), frames=8)
    assert {"flicker", "psnr_db"} <= set(found := by_name(evaluate_files(*what, frames=8))) and "fvd_tf1" not in found
    assert "fvd_tf1 is left out: --num_frames=8 is too short" in capsys.readouterr().err


@pytest.mark.parametrize("name", FVD_PROTOCOLS)
def test_each_protocol_prepares_clips_for_the_network(name):
    """In -1..1 at 224 × 224, white to 1 and black to -1; the aspect ratio is kept by fvd_common alone."""
    clip = np.zeros((2, 32, 64, 3), np.uint8)
    clip[:, :, 32:] = 255
    out = FVD_PROTOCOLS[name].prepare(clip)
    assert out.shape == (2, 224, 224, 3) and out.dtype == np.float32
    assert (out.min(), out.max()) == (-1, pytest.approx(1))
    columns = (out[0, 0, :, 0] > -1).sum()
    assert columns in (112, 113, 114, 115, 116)
    edge = (np.abs(out[0, 0, :, 0]) < 0.999).sum()  # columns between black and white
    assert edge == (6 if name == "fvd_common" else 3 if name == "fvd_tf1" else 4)
