"""A sheet in the workdir that shows what a stage has learned so far, refreshed while it trains."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from walt_jax.data.media import contact_sheet
from walt_jax.data.pipeline import Source
from walt_jax.evaluation.reconstruction import reconstruction_sheet
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.sample import Generator
from walt_jax.workdir import write_atomically

PREVIEW = "preview.png"
CLIPS = 4  # that are reconstructed
SEED = 4321


def due(step: int, every: int) -> bool:
    """Whether the sheet is refreshed after this step: each `every` steps, and after 1/8, 1/4 and 1/2 of the first."""
    return step % every == 0 or step * 8 in (every, 2 * every, 4 * every)


def samples(generator: Callable[[Any], Generator], unseen: Source, count: int) -> Callable[[Any], Image.Image]:
    """What makes a sheet of samples: of the same `count` prompts and seeds each time, so that sheets can be compared.

    Args:
        generator: makes one of the denoiser stage's parameters.
        unseen: the clips whose captions are the prompts, spread evenly over all that differ.
        count: of the prompts.
    """
    captions = list(dict.fromkeys(unseen.captions))
    prompts = [captions[i] for i in np.linspace(0, len(captions) - 1, count).astype(int)]

    def sheet(served: Any) -> Image.Image:
        return contact_sheet(list(generator(served).generate(prompts, [SEED] * count)), prompts)

    return sheet


def reconstructions(
    codec: Codec, trained: Callable[[Any], TrainedTokenizer], unseen: Source
) -> Callable[[Any], Image.Image]:
    """What makes a sheet of the same unseen clips, reconstructed.

    Args:
        codec: the tokenizer's.
        trained: makes one of the tokenizer stage's parameters.
        unseen: the clips.
    """
    clips = [unseen.sample(i, np.random.default_rng([SEED, i])) for i in range(min(CLIPS, len(unseen)))]
    clips = [clip for clip in clips if clip is not None]
    video = np.stack([clip["video"] for clip in clips])

    def sheet(served: Any) -> Image.Image:
        tokenizer = trained(served)
        again = codec.decode(tokenizer, codec.encode(tokenizer, video)[0])[0]
        return reconstruction_sheet(list(video), list(np.asarray(again)), [clip["caption"] for clip in clips])

    return sheet
