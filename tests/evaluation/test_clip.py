"""CLIP with random weights against transformers: ids, prepared pictures, embeddings; and the score of a folder."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from walt_jax.errors import UserError
from walt_jax.evaluation import clip_network, clip_score
from walt_jax.evaluation.clip_tokens import ClipTokens
from walt_jax.evaluation.evaluate_files import evaluate_files
from walt_jax.evaluation.sample_scores import sample_scores
from walt_jax.weight_files import read_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "clip"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script(golden_script):
    return golden_script("make_clip")


@pytest.fixture(scope="module")
def answers():
    return load_file(FOLDER / "answers.safetensors")


@pytest.fixture(scope="module")
def clip():
    tensors, _ = read_tensors(FOLDER / "model.safetensors")
    return clip_network.weights_from(tensors, clip_network.read_clip_config(FOLDER), "m")


def test_ids_are_those_of_transformers(script, answers):
    tokens = ClipTokens.load(FOLDER, 20)
    np.testing.assert_array_equal(tokens.encode(script.CAPTIONS), answers["ids"])


def test_pictures_are_prepared_as_by_transformers(script, answers):
    found = np.concatenate([clip_score.prepare(picture[None], 32) for picture in script.pictures()])
    # Equal with the same Pillow; 13 rounds between its two passes otherwise than 12, by up to 3 of 255.
    off = np.abs(found - answers["prepared"])
    assert off.max() < 0.05 and off.mean() < 0.005


def test_embeddings_are_those_of_transformers(clip, answers):
    pictures = jax.jit(lambda x: clip_network.embed_pictures(clip.vision, x))(answers["prepared"])
    texts = jax.jit(lambda x: clip_network.embed_texts(clip.text, x))(answers["ids"])
    np.testing.assert_allclose(pictures, answers["pictures"], atol=1e-5)
    np.testing.assert_allclose(texts, answers["texts"], atol=1e-5)
    assert (clip.side, clip.length, clip.name) == (32, 20, "ViT-32 wide/8 of 32 pixels")


def test_score_of_a_folder_of_pictures(script, answers, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    captions = script.CAPTIONS[:3]
    for number, picture in enumerate(script.pictures()):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [{"file": f"{number}.png", "prompt": caption} for number, caption in enumerate(captions)]
    (folder / "samples.json").write_text(json.dumps(rows))
    report = evaluate_files(folder, None, tmp_path / "out", weights={"clip": str(FOLDER)})
    (metric,) = report["metrics"]
    cosines = (answers["pictures"] * answers["texts"][:3]).sum(axis=1)
    assert metric["name"] == "clip_score"
    assert metric["value"] == pytest.approx(max(0, 100 * cosines.mean()), abs=0.5)
    assert (metric["count"], metric["frames"]) == (3, 1) and len(metric["detector_sha256"]) == 64
    # Of a table, and without a caption for one of the files.
    (folder / "samples.json").unlink()
    (folder / "metadata.csv").write_text('file_name,caption\n0.png,a red circle moving left\n1.png,""\n')
    again = evaluate_files(folder, None, tmp_path / "out", weights={"clip": str(FOLDER)})
    assert again["metrics"][0]["count"] == 1
    assert again["metrics"][0]["value"] == pytest.approx(max(0, 100 * cosines[0]), abs=0.5)


def test_score_of_a_runs_samples(script, answers):
    """Samples without a prompt are left out."""
    captions = script.CAPTIONS[:3]
    samples = [np.stack([picture[:24, :24], picture[:24, :24]]) for picture in script.pictures()[:3]]
    prompts = [captions[0], "", captions[2]]
    [metric] = sample_scores(samples, prompts, {"clip": str(FOLDER)})
    assert (metric["name"], metric["count"], metric["frames"]) == ("clip_score", 2, 2)
    scorer = clip_score.ClipScorer.find({"clip": str(FOLDER)}, {})
    rows = [scorer.detector.compute(clip_score.prepare(clip, 32)[:1, None])[0] for clip in samples]
    cosines = [100 * float(rows[i] @ answers["texts"][i]) for i in (0, 2)]
    assert metric["value"] == pytest.approx(max(0.0, np.mean(cosines)), abs=1e-3)
    assert sample_scores(samples, prompts, {}) == []


def test_mistakes_are_one_sentence(clip, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    found = {}

    def sentence(weights):
        with pytest.raises(UserError) as raised:
            clip_score.ClipScorer.find({"clip": str(weights)}, videos)
        return str(raised.value)

    assert "is no folder" in sentence(FOLDER / "model.safetensors")
    assert "needs captions" in sentence(FOLDER)
    (videos / "metadata.csv").write_text("file,text\na.png,b\n")
    assert "needs file_name and caption" in sentence(FOLDER)
    (videos / "metadata.csv").write_text("file_name,caption\na.png,b\n")
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        copy = tmp_path / f"without_{name}"
        shutil.copytree(FOLDER, copy)
        (copy / name).unlink()
        found[name] = sentence(copy)
        assert name in found[name] and "can't be read" in found[name]
    copy = tmp_path / "other"
    shutil.copytree(FOLDER, copy)
    save_file({"a": np.zeros(2)}, copy / "model.safetensors")
    assert "are no CLIP's" in sentence(copy) or "is not CLIP's" in sentence(copy) or "no CLIP" in sentence(copy)
    config = json.loads((FOLDER / "config.json").read_text())
    config["text_config"]["hidden_act"] = "relu"
    tensors, _ = read_tensors(FOLDER / "model.safetensors")
    with pytest.raises(UserError, match="activation 'relu'"):
        clip_network.weights_from(tensors, config, "m")
