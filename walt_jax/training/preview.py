"""A sheet in the workdir that shows what a stage has learned so far, renewed while it trains."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from walt_jax.data.media import contact_sheet
from walt_jax.data.pipeline import Source
from walt_jax.evaluation.reconstruction import reconstruction_sheet, usable_clips
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Request
from walt_jax.parallel.processes import fetched, together
from walt_jax.workdir import write_picture

PREVIEW = "preview.png"
CLIPS = 8
SEED = 4321

Preview = Callable[[Any], Image.Image]  # of what a stage serves


def due(step: int, every: int) -> bool:
    """Whether the sheet is renewed after this step: each `every` steps, and after 1/8, 1/4 and 1/2 of those."""
    return step % every == 0 or step * 8 in (every, 2 * every, 4 * every)


def write_preview(workdir: pathlib.Path, sheet: Image.Image) -> None:
    """Writes `preview.png`."""
    write_picture(workdir / PREVIEW, sheet)


def reconstructions(codec: Codec, trained: Callable[[Any], TrainedTokenizer], unseen: Source, images: bool) -> Preview:
    """Makes sheets of reconstructed clips, always of the same ones.

    Args:
        codec: the stage's tokenizer.
        trained: its parameters, from what the stage serves.
        unseen: clips that are not trained on.
        images: whether the stage's tokenizer is one of images: only first frames are shown.
    """
    clips, captions = _clips(unseen)
    clips = clips[:, :1] if images else clips

    def sheet(served: Any) -> Image.Image:
        tokenizer = trained(served)
        latents = together(codec.encode, tokenizer, clips)[0]
        decoded = fetched(together(codec.decode, tokenizer, latents)[0])
        return reconstruction_sheet(list(clips), list(decoded), captions)

    return sheet


def samples(generator: Callable[[Any], Generator], unseen: Source) -> Preview:
    """Makes sheets of samples, always of the same prompts and seeds, so that two sheets can be compared.

    Args:
        generator: has the parameters that the stage serves.
        unseen: clips that are not trained on; their captions are the prompts.
    """
    captions = list(dict.fromkeys(unseen.captions))
    prompts = [captions[i] for i in np.linspace(0, len(captions) - 1, CLIPS).astype(int)]
    seeds = list(range(SEED, SEED + CLIPS))

    def sheet(served: Any) -> Image.Image:
        with_params = generator(served)
        if with_params.low_res is None:
            requests = [Request(*one) for one in zip(prompts, seeds, strict=True)]
            return contact_sheet(with_params.generate(requests), prompts)
        clips, titles = _clips(unseen)
        small = with_params.low_res.encode(clips)
        requests = [Request(*one, low_res=latents) for *one, latents in zip(titles, seeds, small, strict=False)]
        return contact_sheet(with_params.generate(requests), titles)

    return sheet


def _clips(unseen: Source) -> tuple[np.ndarray, list[str]]:
    """Up to `CLIPS` usable clips, spread evenly over the source, and their captions."""
    indices = dict.fromkeys(np.linspace(0, len(unseen) - 1, CLIPS).astype(int).tolist())
    clips, captions = usable_clips(unseen, indices, CLIPS, SEED)
    return np.stack(clips), captions
