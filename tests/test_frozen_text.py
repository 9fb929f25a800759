"""Captions read by a published T5, here a small random one: trained on, kept with latents, and sampled from."""

import json
import pathlib
import shutil

import commands
import numpy as np
import pytest

from walt_jax import main
from walt_jax.config import build
from walt_jax.data.batches import Batches
from walt_jax.data.drawn import COMBINATIONS
from walt_jax.errors import UserError
from walt_jax.text import t5_weights
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import train
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_data import digest
from walt_jax.workdir import read_config

MANY = [f"{word}{ending}" for word in ["drehen", "sehen", "gehen", "stehen", "laufen"] for ending in "abcdefghijklmnop"]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "t5"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of `walt_tiny.py` with such a T5, and a few steps."""
    folder = tmp_path_factory.mktemp("text") / "t5"
    shutil.copytree(GOLDEN, folder)
    (folder / "spiece.model").write_bytes(train([c.caption for c in COMBINATIONS], 310))
    sizes = {"dim": 12, "layers": 2, "heads": 2, "head_dim": 4, "mlp_dim": 20}
    return [
        commands.TINY,
        f"--config.text.pretrained={folder}",
        "--config.text.vocab_size=320",
        *(f"--config.text.encoder.{name}={size}" for name, size in sizes.items()),
        "--config.stages.tokenizer.steps=3",
        "--config.stages.denoiser.steps=6",
        "--config.stages.denoiser.cached_clips=12",
        "--config.evaluation.clips=2",
        "--config.evaluation.prompts=2",
    ]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("runs") / "frozen"
    code, _, err = commands.run(*flags, f"--workdir={workdir}", cache=cache)
    assert code == 0, err
    return workdir


def test_a_run_on_kept_embeddings_is_the_same_to_the_last_bit(flags, trained, tmp_path, cache):
    encode = [f"--workdir={trained}", "--mode=encode", "--clips=12", f"--out={tmp_path / 'latents'}"]
    code, _, err = commands.run(*encode, cache=cache)
    assert code == 0, err
    assert (tmp_path / "latents" / "empty.npy").exists()
    again = [
        *flags,
        f"--workdir={tmp_path / 'run'}",
        f"--config.tokenizer_from={trained}",
        f"--config.stages.denoiser.latents={tmp_path / 'latents'}",
    ]
    code, _, err = commands.run(*again, cache=cache)
    assert code == 0, err
    assert commands.losses(tmp_path / "run") == commands.losses(trained)[3:]
    # Its tokenizer can be taken as well, which it has taken itself.
    knobs = {**read_config(tmp_path / "run"), "tokenizer_from": str(tmp_path / "run")}
    third = Run(build(RunConfig, knobs, "config"), tmp_path / "third")
    first = Run(build(RunConfig, read_config(trained), "config"), trained)
    assert digest(third.tokenizer()) == digest(first.tokenizer())
    # Embeddings of captions that are cut elsewhere are others.
    other = [*again, "--config.text.length=5", f"--workdir={tmp_path / 'other'}"]
    code, _, err = commands.run(*other, cache=cache)
    assert code == 1
    assert "no captions that this run's config.text has read" in err


def test_prompts_matter_and_samples_do_not_depend_on_other_samples(trained, tmp_path, cache):
    prompts = ["--prompt=a red circle moving left", "--prompt=a blue square moving up"]
    for name, some in {"both": prompts, "one": prompts[1:]}.items():
        sample = [f"--workdir={trained}", "--mode=sample", f"--out={tmp_path / name}", *some]
        code, _, err = commands.run(*sample, cache=cache)
        assert code == 0, err
    first, second = sorted((tmp_path / "both").glob("*.mp4"))
    (single,) = (tmp_path / "one").glob("*.mp4")
    assert second.read_bytes() == single.read_bytes() != first.read_bytes()


def test_clips_that_are_not_encoded_beforehand_have_their_captions_read_as_well(trained):
    knobs = read_config(trained)
    run = Run(build(RunConfig, knobs, "config"), trained)
    ids = next(iter(Batches(run.data.clips("denoiser"), (4,))))["text"]
    text = next(iter(run.data.batches("denoiser")))["text"]
    encoder = T5Encoder(run.config.text.encoder, 320)
    params = t5_weights.load(run.config.text.pretrained, run.config.text.encoder, 320)
    assert (ids[:, 0] > 0).all() and len(np.unique(ids, axis=0)) > 1
    np.testing.assert_array_equal(text.mask, ids != 0)
    plain = encoder.apply({"params": params}, ids, ids != 0)
    np.testing.assert_allclose(text.embeddings[text.mask], plain[text.mask], atol=1e-5)


def test_another_vocabulary_than_the_t5s_is_refused_at_once(flags, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(GOLDEN, folder)
    knobs = json.loads(json.dumps(main.parse([*flags, f"--config.text.pretrained={folder}"]).config.to_dict()))
    cases = {train(MANY, 400): "and its folder's T5 embeds", b"broken": "as a sentencepiece model"}
    for content, words in cases.items():
        (folder / "spiece.model").write_bytes(content)
        with pytest.raises(UserError, match=words):
            Run(build(RunConfig, knobs, "config"), tmp_path / "run").check()


def test_a_folder_without_a_t5_is_refused_at_once(flags, tmp_path, cache):
    code, _, err = commands.run(
        *flags, f"--config.text.pretrained={tmp_path / 'nowhere'}", f"--workdir={tmp_path / 'run'}", cache=cache
    )
    assert code == 1
    assert "nowhere holds no T5 that can be read" in err
    assert len(err.strip().splitlines()) == 1
