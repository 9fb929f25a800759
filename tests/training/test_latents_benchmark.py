"""What is counted as read of cached latents is what their clips have, as batches and as packs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from walt_jax.config import build
from walt_jax.data.shapes import ShapeConfig
from walt_jax.main import parse
from walt_jax.text.t5 import T5Config
from walt_jax.training import latents_benchmark as lib
from walt_jax.training.loop import PackConfig
from walt_jax.training.run_config import RunConfig, TextConfig

TINY = build(RunConfig, parse(["--config=walt_tiny"]).config.to_dict(), "config")
CHANNELS, PATCH = 12, 4  # numbers of a latent position, and positions of a token


@pytest.fixture
def batches(monkeypatch):
    """The batches that were put onto the device, and how long each took: a second."""
    monkeypatch.setattr(lib, "CLIPS", 12)
    monkeypatch.setattr(lib, "ROUNDS", 2)
    monkeypatch.setattr(lib, "TOKENS", 60)
    found, put = [], jax.device_put
    monkeypatch.setattr(lib.jax, "device_put", lambda batch: found.append(batch) or put(batch))
    monkeypatch.setattr(lib.time, "perf_counter", lambda: float(len(found)))
    return found


def changed(**stage):
    stages = TINY.stages | {"denoiser": dataclasses.replace(TINY.stages["denoiser"], **stage)}
    return dataclasses.replace(TINY, stages=stages)


def test_batches_are_counted(batches):
    """Of 4 clips of 2 × 2 × 2 tokens a second."""
    row = lib.benchmark_latents(TINY, "denoiser")
    assert row["name"] == "read_latents" and row["seconds_median"] == 2 and len(batches) == 6
    assert (row["tokens_per_second"], row["clips_per_second"], row["tokens_valid_fraction"]) == (32, 4, 1)
    assert row["bytes_per_second"] == 32 * PATCH * CHANNELS * 4
    for batch in batches:
        assert batch["latents"].shape == (4, 2, 4, 4, CHANNELS) and batch["latents"].std() > 0.9
        assert batch["text"].shape == (4, 16) and batch["text"].any()
    json.dumps(row)


def test_packs_are_counted_without_padding(batches):
    """Of 20 tokens two clips of 8 fill 16."""
    packed = changed(pack=PackConfig(20, 3), batch_size=2, shapes={"clip": ShapeConfig()})
    row = lib.benchmark_latents(packed, "denoiser")
    assert row["name"] == "read_latents_packed" and row["seconds_median"] == 2
    assert (row["tokens_per_second"], row["clips_per_second"], row["tokens_valid_fraction"]) == (32, 4, 0.8)
    assert row["bytes_per_second"] == 32 * PATCH * CHANNELS * 4
    assert all(batch["tokens"].shape == (2, 20, PATCH * CHANNELS) for batch in batches)


def test_embeddings_of_a_frozen_encoder_are_read_too(batches):
    text = TextConfig(512, 6, T5Config(16, 1, 2, 8, 32), pretrained="nowhere")
    lib.benchmark_latents(dataclasses.replace(TINY, text=text), "denoiser")
    assert batches[0]["text"].embeddings.shape == (4, 6, 16)
    assert np.abs(batches[0]["text"].embeddings).mean() > 0.5
