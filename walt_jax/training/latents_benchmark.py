"""How many tokens a second a host reads of cached latents: as batches or packs, from its disk onto its devices."""

import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

import grain
import jax
import numpy as np

from walt_jax.data.drawn import COMBINATIONS
from walt_jax.data.latents import Encoded, LatentClips, write_latents
from walt_jax.parallel.mesh import data_shards, make_mesh
from walt_jax.training.latent_batches import dense_batches
from walt_jax.training.pack_batches import Packing, packs_of_latents
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_text import RunText

CLIPS, ROUNDS = 4096, 5
BYTES = 2**28  # of latents and embeddings, at most, but FEWEST clips
FEWEST = 256
TOKENS = 500_000  # at least so many a round


def benchmark_latents(config: RunConfig, name: str) -> dict[str, Any]:
    """Times a stage's batches of random latents in a data set on this host's disk.

    Nothing is kept in memory between batches, as where latents take many times `data.cache_bytes`; the system may keep
    what was just written. The batches are those of all of this host's devices: of several hosts each reads a part.

    Args:
        config: of a denoiser.
        name: of one of its stages.

    Returns:
        {"name", "seconds_median" and "clips" of a round, "tokens_per_second", of clips, without padding,
        "tokens_valid_fraction", "clips_per_second", "bytes_per_second"}, the bytes those of latents.
    """
    with tempfile.TemporaryDirectory() as folder:
        batches = _batches(config, name, pathlib.Path(folder))
        iterator, seconds, found = iter(batches), [], []
        for _ in range(ROUNDS + 1):
            began, counts = time.perf_counter(), []
            while sum(tokens for tokens, *_ in counts) < TOKENS:
                batch = next(iterator)
                counts.append(_counts(config, name, batch))
                jax.block_until_ready(jax.device_put(batch))
            seconds.append(time.perf_counter() - began)
            found.append([sum(each) for each in zip(*counts, strict=True)])
        iterator.close()
    # The first round opens the files.
    rates = [np.array(counts) / taken for counts, taken in zip(found[1:], seconds[1:], strict=True)]
    tokens, _, clips, content = (statistics.median(each) for each in zip(*rates, strict=True))
    valid, places, *_ = np.sum(found[1:], axis=0)
    return {
        "name": "read_latents" if config.stages[name].pack is None else "read_latents_packed",
        "seconds_median": statistics.median(seconds[1:]),
        "tokens_per_second": tokens,
        "tokens_valid_fraction": float(valid / places),
        "clips_per_second": clips,
        "bytes_per_second": content,
    }


def _counts(config: RunConfig, name: str, batch: dict[str, Any]) -> tuple[int, int, int, int]:
    """A batch's tokens, places for tokens, clips and bytes of latents."""
    if config.stages[name].pack is None:
        clips, *size, _ = batch["latents"].shape
        tokens = clips * int(np.prod(config.denoiser.grid(tuple(size))))
        return tokens, tokens, clips, batch["latents"].nbytes
    tokens, clips = int((batch["pack"].positions[..., 0] >= 0).sum()), int((batch["pack"].sizes[..., 0] > 0).sum())
    return tokens, batch["tokens"].shape[0] * batch["tokens"].shape[1], clips, tokens * batch["tokens"][0, 0].nbytes


def _batches(config: RunConfig, name: str, folder: pathlib.Path) -> grain.IterDataset:
    """A stage's batches of a data set that is written into the folder."""
    stage, text = config.stages[name], RunText(config, folder / "run")
    captions = [each.caption for each in COMBINATIONS]
    if config.pretrained_text is None:
        (folder / "run").mkdir()
        if config.denoiser.classes:
            captions = [str(label) for label in range(config.denoiser.classes)]
        text.keep(text.make(captions, ()))
    clips = LatentClips(_write(config, name, folder / "latents", captions), cache_bytes=0)
    read_captions, dropout = text.reader(clips.empty), config.data.caption_dropout
    if stage.pack is None:
        sizes = {
            latents[:3]: size
            for shape, size in zip(config.clip_shapes(name), config.batch_sizes(name), strict=True)
            for latents in config.latent_shapes(shape)
        }
        return dense_batches(clips, read_captions, dropout, sizes, config.seed)
    shards = data_shards(make_mesh(config.mesh, jax.local_devices())) * stage.accumulate
    packing = Packing(
        config.denoiser_of(name),
        stage.batch_size,
        stage.pack.tokens,
        stage.pack.clips,
        config.seed,
        dropout,
        stage.pack.drop,
        stage.pack.frames,
        shards,
        stage.pack.packers,
    )
    return packs_of_latents(clips, read_captions, packing)


def _write(config: RunConfig, name: str, out: pathlib.Path, captions: list[str]) -> pathlib.Path:
    """A data set of random latents of a stage's sizes, with captions, as `--mode=encode` would write it."""
    rng, frequencies = np.random.default_rng(0), config.latent_sizes(name)
    channels, scale, text = config.tokenizer.latent_channels, config.denoiser.upscale, config.pretrained_text
    sizes, weights = list(frequencies), np.array(list(frequencies.values())) / sum(frequencies.values())

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def encoded(numbers: range) -> list[Encoded]:
        clips = []
        for number in numbers:
            t, h, w = sizes[rng.choice(len(sizes), p=weights)]
            caption = captions[number % len(captions)]
            embeddings = None if text is None else normal(text.length, text.encoder.dim)
            low_res = normal(t, h // scale, w // scale, channels) if scale > 1 else None
            clips.append(Encoded(normal(t, h, w, channels), caption, embeddings, low_res))
        return clips

    identity = {"low_res": "random"} if scale > 1 else {}
    numbers = channels * max(map(math.prod, sizes)) + (0 if text is None else text.length * text.encoder.dim)
    count = min(CLIPS, max(FEWEST, BYTES // (4 * numbers)))
    write_latents(out, identity, count, encoded, None if text is None else lambda: normal(1, text.encoder.dim))
    return out
