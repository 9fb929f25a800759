"""Samples videos from prompts, and writes them to files."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm.auto
from jaxtyping import Float, UInt8

from walt_jax.data.media import contact_sheet, write_video
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig
from walt_jax.generation.low_res import LowRes
from walt_jax.parallel.processes import fetched, is_first
from walt_jax.text.frozen import FrozenText
from walt_jax.text.labels import Labels
from walt_jax.text.vocabulary import Vocabulary
from walt_jax.workdir import write_atomically, write_picture


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained model with all that it needs to sample.

    Attributes:
        model: the modules.
        params: of text encoder and denoiser.
        tokenizer: decodes latents.
        captions: encodes prompts.
        config: see `SamplingConfig`.
        low_res: of super-resolution: encodes low-resolution clips, without which the model can't sample.
    """

    model: LatentDiffusion
    params: Any
    tokenizer: TrainedTokenizer
    captions: Vocabulary | Labels | FrozenText
    config: SamplingConfig
    low_res: LowRes | None = None

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        low_res: Float[np.ndarray, "n t h2 w2 c"] | None = None,
        bar: bool | None = None,
    ) -> UInt8[np.ndarray, "n t h w 3"]:
        """One video for each prompt and seed. A video depends on its own prompt and seed only.

        Args:
            prompts, seeds: one of each for a video.
            low_res: latents of the low-resolution videos, for super-resolution.
            bar: whether progress is shown; by default, where there are several batches.
        """
        text_tokens, seeds = self.captions.encode(prompts), np.asarray(seeds, np.uint32)
        empty = jax.tree.map(lambda array: array[0], self.captions.encode([""]))
        # Batches of one size: one program is compiled, and a video does not depend on how many there are.
        size = self.config.batch_size
        clips, hidden = [], len(prompts) <= size if bar is None else not bar
        with tqdm.auto.tqdm(total=len(prompts), desc="sampling", unit="clip", disable=hidden) as progress:
            for first in range(0, len(prompts), size):
                rows = np.minimum(np.arange(first, first + size), len(prompts) - 1)
                some = jax.tree.map(lambda array, rows=rows: array[rows], text_tokens)
                small = None if low_res is None else low_res[rows]
                batch = self.model.sample(
                    self.params, self.tokenizer, some, empty, seeds[rows], self.config, low_res=small
                )
                clips.append(fetched(batch)[: len(prompts) - first])
                progress.update(len(clips[-1]))
        return np.concatenate(clips)


def write_samples(
    out: pathlib.Path,
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    fps: float,
    suffixes: Sequence[str] = (".mp4",),
) -> list[dict]:
    """Writes each clip as a video file, and `samples.json` and `contact_sheet.png`; of several processes, the first.

    Args:
        out: the folder; it is created if it does not exist, and other files in it are kept.
        clips: the videos.
        prompts, seeds: of each video.
        fps: frames a second.
        suffixes: file formats, ".mp4" or ".gif"; `samples.json` names the files of the first one.

    Returns:
        What `samples.json` holds: {"file", "prompt", "seed"} for each clip, files relative to `out`.
    """
    if is_first():
        out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (clip, prompt, seed) in enumerate(zip(clips, prompts, seeds, strict=True)):
        name = f"{index:03d}_{slug(prompt)}_seed{seed}"
        for suffix in suffixes if is_first() else ():
            write_video(out / f"{name}{suffix}", clip, fps)
        rows.append({"file": f"{name}{suffixes[0]}", "prompt": prompt, "seed": int(seed)})
    write_atomically(out / "samples.json", json.dumps(rows, indent=1) + "\n")
    write_picture(out / "contact_sheet.png", contact_sheet(list(clips), list(prompts)))
    return rows


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "unconditional"
