"""From files that others have published to pictures, and back to such files, here with small random weights."""

import json
import pathlib

import commands
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import walt_jax
from walt_jax import main
from walt_jax.data.video import read_clip
from walt_jax.tokenizer.autoencoder_kl_weights import load_weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = """
import runpy

from ml_collections import ConfigDict


def get_config():
    config = runpy.run_path("configs/dit_s_2.py")["get_config"]()
    config.data.update(height=32, width=32)
    config.tokenizer.update(channel_multipliers=(1, 1, 2), downsample=((1, 2, 2),) * 2)
    config.denoiser.update(
        dim=24, heads=2, layers=2, classes=5, time_frequencies="diffusers", dtype="float32", scan=False, remat="none"
    )
    config.sampling.update(steps=3, batch_size=2)
    return config
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A config, a DiT and an autoencoder."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.py").write_text(CONFIG)
    tensors = load_file(GOLDEN / "published_dit.safetensors")
    save_file(
        {name: x for name, x in tensors.items() if not name.startswith("input.") and name != "output"},
        folder / "dit.safetensors",
    )
    tensors = load_file(GOLDEN / "autoencoder_kl.safetensors")
    save_file(
        {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")},
        folder / "autoencoder.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 4}))
    return folder


def flags(files, workdir):
    return [
        f"--config={files / 'config.py'}",
        f"--config.init_from={files / 'dit.safetensors'}",
        f"--config.tokenizer_from={files / 'autoencoder.safetensors'}",
        f"--workdir={workdir}",
    ]


def test_pictures_are_sampled_without_training(files, tmp_path, cache):
    sample = ["--mode=sample", "--prompt=4", "--prompt=0", "--out", str(tmp_path / "out")]
    code, _, err = commands.run(*flags(files, tmp_path / "run"), *sample, cache=cache)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [row["prompt"] for row in rows] == ["4", "0"]
    clips = [read_clip(tmp_path / "out" / row["file"]) for row in rows]
    assert all(clip.shape == (1, 32, 32, 3) for clip in clips)
    assert clips[0].std() > 1 and (clips[0] != clips[1]).any()
    code, _, err = commands.run(*flags(files, tmp_path / "run"), "--mode=sample", "--prompt=5", cache=cache)
    assert code == 1
    assert "'5' is not one of the 5 classes of this run" in err


def test_training_starts_from_them_and_goes_back_to_such_a_file(files, tmp_path, cache):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    lines = ["file_name,label"]
    for number in range(10):
        picture = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(picture).save(pictures / f"{number}.png")
        lines.append(f"{number}.png,{'abcde'[number % 5]}")
    (pictures / "metadata.csv").write_text("\n".join(lines) + "\n")
    train = [
        f"--config.data.source={pictures}",
        "--config.stages.denoiser.steps=1",
        "--config.stages.denoiser.cached_clips=8",
        "--config.stages.denoiser.batch_size=2",
        "--config.stages.denoiser.optimizer.learning_rate=1e-30",
        "--config.evaluation.clips=2",
        "--config.evaluation.prompts=1",
    ]
    code, _, err = commands.run(*flags(files, tmp_path / "run"), *train, cache=cache)
    assert code == 0, err
    out = tmp_path / "back.safetensors"
    code, _, err = commands.run(f"--workdir={tmp_path / 'run'}", "--mode=export", f"--out={out}", cache=cache)
    assert code == 0, err
    before, after = load_file(files / "dit.safetensors"), load_file(out)
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], tensor, rtol=1e-5, atol=1e-6)
    # As folders of diffusers' classes, of the denoiser and of the autoencoder.
    folder = tmp_path / "diffusers"
    assert main.main([f"--workdir={tmp_path / 'run'}", "--mode=export", "--format=diffusers", f"--out={folder}"]) == 0
    weights = "diffusion_pytorch_model.safetensors"
    again = load_file(folder / "transformer" / weights)
    assert set(again) == set(after) and all((again[name] == after[name]).all() for name in after)
    autoencoder, there = load_file(files / "autoencoder.safetensors"), load_file(folder / "vae" / weights)
    assert set(there) == set(autoencoder)
    for name, tensor in autoencoder.items():
        np.testing.assert_array_equal(there[name], tensor.astype(np.float32).reshape(there[name].shape))
    stated = json.loads((folder / "transformer" / "config.json").read_text())
    sizes = {"num_layers": 2, "attention_head_dim": 12, "sample_size": 8, "num_embeds_ada_norm": 5, "out_channels": 8}
    assert stated["_class_name"] == "DiTTransformer2DModel" and sizes.items() <= stated.items()
    config, _ = load_weights(folder / "vae" / weights)
    assert config == load_weights(files / "autoencoder.safetensors")[0]
    assert "AutoencoderKL" in (folder / "vae" / "config.json").read_text() and (folder / "README.md").exists()
    # And as this project's own, which needs neither of the files it came from.
    assert main.main([f"--workdir={tmp_path / 'run'}", "--mode=export", f"--out={tmp_path / 'own'}"]) == 0
    (files / "autoencoder.safetensors").rename(files / "gone")
    try:
        model = walt_jax.load(tmp_path / "own")
        assert model.reconstruct(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 32, 32, 3)
    finally:
        (files / "gone").rename(files / "autoencoder.safetensors")
