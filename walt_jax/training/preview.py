"""What a stage has learned so far, while it trains: a sheet in the workdir that is renewed, and a video each time."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from walt_jax.data.media import contact_sheet, mp4
from walt_jax.data.pipeline import Source
from walt_jax.evaluation.reconstruction import reconstruction_sheet, usable_clips
from walt_jax.evaluation.report_previews import FOLDER, steps_of
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Request
from walt_jax.parallel.processes import fetched, is_first, together
from walt_jax.workdir import write_atomically, write_picture

PREVIEW = "preview.png"
CLIPS = 8
SEED = 4321

KEPT = 24  # videos of a stage: of more, those that are closest to their neighbours are removed
GAP = 2  # pixels between clips of a video


class Shown(NamedTuple):
    """What a stage has learned.

    Attributes:
        sheet: frames of the clips, with captions.
        rows: the same clips, all of one size; a row is next to the other.
        captions: of the clips of a row.
        what: the rows, in words.
        fps: frames a second.
    """

    sheet: Image.Image
    rows: Sequence[Sequence[UInt8[np.ndarray, "t h w 3"]]]
    captions: Sequence[str]
    what: str
    fps: float


Preview = Callable[[Any], Shown]  # of what a stage serves


def due(step: int, every: int) -> bool:
    """Whether the sheet is renewed after this step: each `every` steps, and after 1/8, 1/4 and 1/2 of those."""
    return step % every == 0 or step * 8 in (every, 2 * every, 4 * every)


def write_preview(workdir: pathlib.Path, stage: str, step: int, shown: Shown) -> None:
    """Writes `preview.png`, and `previews/STAGE/STEP.mp4` for the report; videos of later steps are removed."""
    write_picture(workdir / PREVIEW, shown.sheet)
    about = {"what": shown.what, "captions": list(shown.captions)}
    write_atomically(workdir / FOLDER / f"{stage}.json", json.dumps(about, ensure_ascii=False) + "\n")
    folder = workdir / FOLDER / stage
    write_atomically(folder / f"{step}.mp4", mp4(tiled(shown.rows), shown.fps))
    if is_first():
        steps = steps_of(folder)
        for gone in set(steps) - set(kept([one for one in steps if one <= step])):
            (folder / f"{gone}.mp4").unlink()


def kept(steps: list[int], most: int = KEPT) -> list[int]:
    """So many of the steps, with the first and the last one, spread as evenly as they can be."""
    steps = list(steps)
    while len(steps) > most:
        del steps[min(range(1, len(steps) - 1), key=lambda place: steps[place + 1] - steps[place - 1])]
    return steps


def tiled(rows: Sequence[Sequence[UInt8[np.ndarray, "t h w 3"]]]) -> UInt8[np.ndarray, "t hh ww 3"]:
    """One clip of rows of clips of one size, with white between them."""
    length, height, width, _ = rows[0][0].shape
    columns = max(map(len, rows))
    whole = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    frames = np.full((length, *whole, 3), 255, np.uint8)
    for row, clips in enumerate(rows):
        for column, clip in enumerate(clips):
            top, left = row * (height + GAP), column * (width + GAP)
            frames[:, top : top + height, left : left + width] = clip
    return frames


def reconstructions(
    codec: Codec, trained: Callable[[Any], TrainedTokenizer], unseen: Source, images: bool, fps: float
) -> Preview:
    """Makes sheets of reconstructed clips, always of the same ones.

    Args:
        codec: the stage's tokenizer.
        trained: its parameters, from what the stage serves.
        unseen: clips that are not trained on.
        images: whether the stage's tokenizer is one of images: only first frames are shown.
        fps: frames a second.
    """
    clips, captions = _clips(unseen)
    clips = clips[:, :1] if images else clips

    def sheet(served: Any) -> Shown:
        tokenizer = trained(served)
        latents = together(codec.encode, tokenizer, clips)[0]
        decoded = fetched(together(codec.decode, tokenizer, latents)[0])
        picture = reconstruction_sheet(list(clips), list(decoded), captions)
        return Shown(picture, [list(clips), list(decoded)], captions, "unseen clips, and their reconstructions", fps)

    return sheet


def samples(generator: Callable[[Any], Generator], unseen: Source, fps: float) -> Preview:
    """Makes sheets of samples, always of the same prompts and seeds, so that two sheets can be compared.

    Args:
        generator: has the parameters that the stage serves.
        unseen: clips that are not trained on; their captions are the prompts.
        fps: frames a second.
    """
    captions = list(dict.fromkeys(unseen.captions))
    prompts = [captions[i] for i in np.linspace(0, len(captions) - 1, CLIPS).astype(int)]
    seeds = list(range(SEED, SEED + CLIPS))

    def sheet(served: Any) -> Shown:
        with_params = generator(served)
        if with_params.low_res is None:
            requests = [Request(*one) for one in zip(prompts, seeds, strict=True)]
            made = with_params.generate(requests)
            return Shown(contact_sheet(made, prompts), [made], prompts, "samples of equal prompts and seeds", fps)
        clips, titles = _clips(unseen)
        small = with_params.low_res.encode(clips)
        requests = [Request(*one, low_res=latents) for *one, latents in zip(titles, seeds, small, strict=False)]
        made = with_params.generate(requests)
        return Shown(contact_sheet(made, titles), [made], titles, "unseen clips, shrunk and upscaled", fps)

    return sheet


def _clips(unseen: Source) -> tuple[np.ndarray, list[str]]:
    """Up to `CLIPS` usable clips, spread evenly over the source, and their captions."""
    indices = dict.fromkeys(np.linspace(0, len(unseen) - 1, CLIPS).astype(int).tolist())
    clips, captions = usable_clips(unseen, indices, CLIPS, SEED)
    return np.stack(clips), captions
