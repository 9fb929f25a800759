"""What stages measure of unseen clips equals what evaluation measures of them; rFVD equals the distance of features."""

import dataclasses

import jax
import numpy as np
import pytest
import small_generator

from walt_jax import main
from walt_jax.data.frame_groups import frame_groups
from walt_jax.data.pipeline import Data, DataConfig
from walt_jax.data.shapes import ClipShape
from walt_jax.diffusion.objective import Draws, diffusion_loss, draw
from walt_jax.evaluation import distances, noise_levels, random_features
from walt_jax.evaluation.config import EvaluationConfig
from walt_jax.evaluation.features import Detector, features_of
from walt_jax.evaluation.frechet import frechet_distance, moments
from walt_jax.evaluation.noise_levels import loss_by_noise
from walt_jax.evaluation.reconstruction import psnr_db, usable_clips
from walt_jax.evaluation.reconstruction_distances import reconstruction_distances
from walt_jax.generation.request import Request
from walt_jax.training import validation

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = EvaluationConfig(4, validation_clips=3, validation_samples=2, distances=("frechet_random_features",), seed=5)


@pytest.fixture(scope="module")
def generator():
    return small_generator.make()


@pytest.fixture(scope="module")
def unseen():
    return Data(DataConfig("drawn", 9, 16, 16)).source("held_out", (ClipShape(9, 16, 16),))


def frechet(one, other):
    detector, protocol = random_features.random_detector(), random_features.RANDOM_PROTOCOL
    return frechet_distance(*(moments(features_of(detector, protocol, clips), 1) for clips in (one, other)))


def test_a_denoiser_is_measured_by_its_loss_and_its_samples(generator, unseen):
    validate = validation.of_denoiser(lambda params: dataclasses.replace(generator, params=params), unseen, CONFIG)
    values, protocols = validate(generator.params)
    clips, captions = usable_clips(unseen, range(len(unseen)), 3, 5)
    losses = {row["name"]: row["value"] for row in loss_by_noise(generator, np.stack(clips), captions, 5)}
    assert {f"validation_{name}": value for name, value in losses.items()}.items() <= values.items()
    assert min(losses.values()) < values["validation_loss"] < max(losses.values())
    prompts = unseen.captions[:2]
    samples = generator.generate([Request(prompt, seed) for seed, prompt in enumerate(prompts)])
    assert values["validation_frechet_random_features"] == pytest.approx(frechet(samples, clips), rel=1e-3)
    assert set(values) == set(protocols)
    assert "3 unseen clips" in protocols["validation_loss"]
    assert "2 samples against 3" in protocols["validation_frechet_random_features"]
    again, _ = validate(generator.params)
    assert again == values


def test_a_model_of_groups_of_frames_is_measured_on_groups(generator, unseen, monkeypatch):
    """The twin: each clip alone, its frames at their places, with its own part of the pack's noise."""
    monkeypatch.setattr(noise_levels, "ROUNDS", 1)
    call, model = 2, generator.model
    clips, captions = usable_clips(unseen, range(len(unseen)), 3, 5)
    of_groups = dataclasses.replace(generator, call=call, packed=True)
    found, protocol = noise_levels.noise_losses(of_groups, np.stack(clips), captions, 5)
    assert "groups of at most 2 latent frames" in protocol
    expected, width = np.zeros((2, 4)), 4  # tokens of a latent frame
    for first in (0, 2):  # batches of two clips
        key, start = jax.random.fold_in(jax.random.key(5), first), 0
        for clip in range(2 if first == 0 else 1):
            group = frame_groups(3, call, np.random.default_rng([5, first, 0, clip]))
            text = generator.captions.encode([captions[first + clip]])
            latents = np.asarray(model.codec.encode(generator.tokenizer, clips[first + clip][None])[0])
            layout, text, tokens, mask = noise_levels.packed(model, latents, text, [group], call)
            there = np.asarray(layout.pack.positions[0, :, 0]) == 0
            np.testing.assert_array_equal(layout.pack.positions[0, there, 1], group.frames.repeat(width))
            np.testing.assert_array_equal(mask[0, there, 0], group.observed.repeat(width))
            drawn = draw(key, tokens.shape, (1, 4), model.diffusion)
            drawn = Draws(
                drawn.time[:, [clip] * 4], np.roll(drawn.noise, -start, axis=1), drawn.self_conditioned[:, [clip] * 4]
            )
            start += there.sum()
            _, binned = diffusion_loss(
                model.denoise(generator.params, model.condition(generator.params, text, tokens, mask), layout),
                tokens,
                there[None, :, None] * (1 - np.asarray(model.per_value(mask))),
                np.full((1, 4), 3 * width),
                None,
                layout.spread,
                drawn,
                model.diffusion,
            )
            expected += [binned.total, binned.count]
    np.testing.assert_allclose([found.total, found.count], expected, rtol=1e-3)
    assert 0 < found.count.sum() < 3 * call * width * tokens.shape[-1]  # some are observed


def test_a_tokenizer_is_measured_by_its_reconstructions(generator, unseen):
    codec, config = generator.model.codec, dataclasses.replace(CONFIG, validation_clips=2)
    values, protocols = validation.of_tokenizer(codec, lambda served: served, unseen, False, config)(
        generator.tokenizer
    )
    clips, _ = usable_clips(unseen, range(len(unseen)), 2, 5)
    latents = codec.encode(generator.tokenizer, np.stack(clips))[0]
    again = np.asarray(codec.decode(generator.tokenizer, latents)[0])
    expected = np.mean([psnr_db(*pair) for pair in zip(clips, again, strict=True)])
    assert values["validation_psnr_db"] == pytest.approx(expected, rel=1e-3)
    name = "validation_reconstruction_frechet_random_features"
    assert values[name] == pytest.approx(frechet(list(again), clips), rel=1e-2)
    assert set(values) == set(protocols)


def test_distances_of_reconstructions_have_the_fields_names_only_with_the_weights(monkeypatch):
    monkeypatch.setattr(distances, "find_weights", lambda network, given: given.get(network))
    rng = np.random.default_rng(0)
    clips = list(rng.integers(0, 256, (5, 20, 8, 8, 3), np.uint8))
    others = [np.clip(clip.astype(int) + 20, 0, 255).astype(np.uint8) for clip in clips]
    names = ("fvd_tf1", "fvd_stylegan_v", "fid_tf1")
    found = [row["name"] for row in reconstruction_distances(clips, others, names, {}, "here")]
    assert found == [
        f"reconstruction_{kind}_random_{of}features" for of in ("", "image_") for kind in ("frechet", "kernel")
    ]
    means = Detector("mean colours", "0" * 64, 3, 1, jax.jit(lambda clips: clips.mean(axis=(1, 2, 3))))
    monkeypatch.setitem(distances.DETECTORS, "i3d", lambda path: means)
    rows = reconstruction_distances(clips, others, names[:2], {"i3d": "w"}, "here")
    assert [row["name"] for row in rows] == ["rfvd_tf1", "rkvd_tf1", "rfvd_stylegan_v", "rkvd_stylegan_v"]
    assert rows[0]["frames"] == 16 and "the first 16 of 20 frames; here" in rows[0]["protocol"]
    assert rows[0]["value"] > 0 and rows[0]["value"] != rows[2]["value"]
    assert reconstruction_distances(clips, others, (), {}, "here") == []
    short = [[clip[:1] for clip in some] for some in (clips, others)]  # of a tokenizer of images
    long = Detector("needs three frames", "0" * 64, 3, 3, means.compute)
    monkeypatch.setitem(distances.DETECTORS, "i3d", lambda path: long)
    found = [row["name"] for row in reconstruction_distances(*short, names, {"i3d": "w"}, "here")]
    assert found == [f"reconstruction_{kind}_random_image_features" for kind in ("frechet", "kernel")]


@pytest.mark.parametrize("name, fewest, frames", [("fvd_tf1", 9, 5), ("jedi", 16, 13)])
def test_a_config_with_too_short_clips_for_a_distance_is_refused(name, fewest, frames, tmp_path, capsys):
    values = f"--config.evaluation.distances=('{name}',)", f"--config.data.frames={frames}"
    assert main.main(["--config=configs/walt_tiny.py", "--mode=plan", f"--workdir={tmp_path}", *values]) == 1
    assert (
        f"evaluation.distances names {name}, whose network needs {fewest} frames, and clips have {frames}: leave "
        f"it out, or set data.frames to {fewest} or more"
    ) in capsys.readouterr().err
