"""A cascade: a base model's videos, upscaled by super-resolution runs one after the other (W.A.L.T, section 3.5).

Of a video that is longer than a model's clips, each run makes a window as soon as the run before it has made what the
window needs: all of them work on the same part of the video, in memory that does not grow with its length.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.errors import UserError
from walt_jax.generation.asking import encoded
from walt_jax.generation.codec import chunks
from walt_jax.generation.generator import Generator
from walt_jax.generation.long_video import Keep, Segment, Window, group_ends, keep_nothing, segments
from walt_jax.generation.low_res import LowRes
from walt_jax.generation.request import Request, Size
from walt_jax.parallel.processes import fetched, together


def upscaled(
    base: Generator, stages: Sequence[Generator], requests: Sequence[Request], latents: Sequence[np.ndarray]
) -> list[Float[np.ndarray, "t h w c"]]:
    """The latents of the last stage, which decodes them.

    A stage whose low-resolution tokenizer is the one before it gets the latents as they are; another one gets the
    decoded video, encoded by its own.

    Args:
        base: what made the first videos.
        stages: super-resolution models, in order.
        requests: of the base; prompts and seeds are those of all stages.
        latents: of the base's videos.

    Raises:
        UserError: if a stage does not upscale, or not clips of that length.
    """
    for number, stage in enumerate(stages):
        before = base if number == 0 else stages[number - 1]
        sizes = [upscaled_size(request.size or _pixels(base), stages[: number + 1]) for request in requests]
        if not same_tokenizer(before, stage):
            videos = before.decode(latents)
            latents = [encoded(stage.low_res.codec, stage.low_res.tokenizer, video) for video in videos]
        asked = [
            dataclasses.replace(request, size=size, given=None, low_res=low_res)
            for request, size, low_res in zip(requests, sizes, latents, strict=True)
        ]
        latents = stage.latents(asked)
    return list(latents)


def upscaled_size(size: Size, stages: Sequence[Generator]) -> Size:
    """(frames, height, width) of a video of a size after these stages.

    Raises:
        UserError: if a stage does not upscale, or not clips of that length.
    """
    frames, height, width = size
    for number, stage in enumerate(stages):
        if stage.low_res is None:
            raise UserError(
                f"Run {number + 1} of the cascade does not upscale; name super-resolution runs, which have "
                "config.low_res_from."
            )
        height, width = height * stage.low_res.scale, width * stage.low_res.scale
        if stage.shape((frames, height, width))[0] < stage.model.latent_shape[0]:
            raise UserError(
                f"Run {number + 1} of the cascade upscales videos of {_pixels(stage)[0]} frames and more; leave "
                "--num_frames out, or give as many."
            )
    return frames, height, width


def is_long(base: Generator, stages: Sequence[Generator], size: Size) -> bool:
    """Whether a video has more frames than one of the models makes at once."""
    sizes = [size, *(upscaled_size(size, stages[: number + 1]) for number in range(len(stages)))]
    return any(one.shape(size)[0] > one.longest for one, size in zip([base, *stages], sizes, strict=True))


def upscaled_segments(base: Generator, stages: Sequence[Generator], request: Request, keep: Keep) -> Iterator[Segment]:
    """A long video of the last stage, segment by segment; of no stages, the base's.

    Each stage makes it window by window, as `long_video.segments` does: its windows pass latents on, and each has the
    low-resolution latents of its frames. What comes out is what each stage gives of the whole video before it.

    Args:
        base, stages: as in `upscaled`.
        request: of the base.
        keep: gets the last stage's latents, see `long_video.segments`.

    Raises:
        UserError: if a stage does not upscale, or not videos of that length.
    """
    upscaled_size(request.size, stages)
    found, before = segments(base, request, keep=keep if not stages else keep_nothing), base
    for number, stage in enumerate(stages, start=1):
        if not same_tokenizer(before, stage):
            found = encoded_again(stage.low_res, found)
        asked = dataclasses.replace(request, size=upscaled_size(request.size, stages[:number]), given=None)
        kept = keep if number == len(stages) else keep_nothing
        found, before = segments(stage, asked, keep=kept, low_res=LowResWindows(stage.low_res, found)), stage
    return found


class LowResWindows:
    """The low-resolution latents of each window of a video, which is made as far as the windows need it.

    As in `long_video`, a window's first latent frame is one frame alone: it is encoded as a picture.

    Args:
        low_res: the tokenizer of these latents.
        found: the video's segments.
    """

    def __init__(self, low_res: LowRes, found: Iterator[Segment]):
        self._low_res, self._found = low_res, found
        self._held: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque()  # latents, the last frame
        self._first = 0  # latent frame of the video that the first held one is

    def __call__(self, window: Window) -> Float[np.ndarray, "t h w c"]:
        stride = self._low_res.codec.tokenizer.config.strides[0]
        while self._first + len(self._held) < window.stop:
            made = next(self._found)
            self._held += zip(made.latents, made.frames[group_ends(len(made.frames), stride)], strict=True)
        while self._first < window.start:
            self._held.popleft()
            self._first += 1
        latents = np.stack([one for one, _ in itertools.islice(self._held, window.stop - window.start)])
        if window.start:
            picture = self._held[0][1][None, None]
            latents[0] = fetched(together(self._low_res.codec.encode, self._low_res.tokenizer, picture)[0])[0, 0]
        return latents


def encoded_again(low_res: LowRes, found: Iterator[Segment]) -> Iterator[Segment]:
    """A video's frames with the latents of another tokenizer, a latent frame at a time."""
    cache = None
    frames: Iterator[UInt8[np.ndarray, "h w 3"]] = (frame for segment in found for frame in segment.frames)
    for chunk in chunks(frames, 1, low_res.codec.tokenizer.config.strides[0]):
        shown = np.stack(chunk)
        latents, cache = together(low_res.codec.encode, low_res.tokenizer, shown[None], cache)
        yield Segment(fetched(latents)[0], shown)


def _pixels(generator: Generator) -> Size:
    """(frames, height, width) of a generator's own clips."""
    t, h, w, _ = generator.model.latent_shape
    stride, *space = generator.model.codec.tokenizer.config.strides
    return 1 + (t - 1) * stride, h * space[0], w * space[1]


def same_tokenizer(before: Generator, stage: Generator) -> bool:
    """Whether a stage's low-resolution latents are those that the model before it makes."""
    mine, theirs = before.tokenizer, stage.low_res.tokenizer
    if before.model.codec != stage.low_res.codec or jax.tree.structure(mine) != jax.tree.structure(theirs):
        return False
    return all(
        a.shape == b.shape and bool((np.asarray(a) == np.asarray(b)).all())
        for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True)
    )
