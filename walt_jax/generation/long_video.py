"""Videos longer than the model makes at once: segments that hand on latents and the decoder's cache.

A model that was trained on frames with gaps between them follows a schedule, see `by_schedule`. Of others, each
segment's window begins with the frame before it, encoded as a picture, for a window's first latent frame is one frame
alone; then come latent frames that were made before, as they are; the rest is new. New latents are decoded with the
cache of those before, once: nothing that is seen was decoded and encoded again, which blurs and shifts colours.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.errors import UserError
from walt_jax.generation.by_schedule import calls, leading, observed_frames, seed_of_call
from walt_jax.generation.generator import Generator, Watch
from walt_jax.generation.latent_diffusion import NEVER
from walt_jax.generation.request import Given, Request
from walt_jax.parallel.processes import fetched, together

# Gets numbers of latent frames and their latents, before they are decoded.
Keep = Callable[[Sequence[int], Float[np.ndarray, "k h w c"]], None]


def keep_nothing(frames: Sequence[int], latents: Float[np.ndarray, "k h w c"]) -> None:
    """Where latents are not saved."""


class Window(NamedTuple):
    """A window of the model over a longer video's latent frames.

    Attributes:
        start: latent frame of the video that its first one stands for.
        done: how many of its latent frames are there before it is sampled.
        stop: the latent frame after its last one.
    """

    start: int
    done: int
    stop: int


def windows(total: int, size: int, observed: int) -> list[Window]:
    """Windows that make a video from its start to its end (FDM's "autoreg").

    Args:
        total: latent frames of the video, at least `size`.
        size: latent frames that the model makes at once.
        observed: how many of them are taken from the window before, at least 1; more in the last, which ends with the
            video.
    """
    found = [Window(0, 0, size)]
    while found[-1].stop < total:
        end = found[-1].stop
        start = min(end - observed, total - size)
        found.append(Window(start, end - start, start + size))
    return found


class Segment(NamedTuple):
    """What is added to a video's end."""

    latents: Float[np.ndarray, "t2 h2 w2 c"]
    frames: UInt8[np.ndarray, "t h w 3"]


def segments(
    generator: Generator,
    request: Request,
    watch: Watch | None = None,
    keep: Keep = keep_nothing,
    low_res: Callable[[Window], Float[np.ndarray, "t h w c"]] | None = None,
) -> Iterator[Segment]:
    """Makes a video of any length, window by window, in memory that does not grow with it; or by a schedule.

    Args:
        generator: see `Generator`.
        request: of a video that is longer than the model's clips; what is given of it is read as it is needed.
        watch: see `Generator.latents`.
        keep: called with what each window, or call, has made, before any of it is decoded.
        low_res: of super-resolution: the low-resolution latents of a window; called for each, in order.

    Raises:
        UserError: if the model makes pictures.
    """
    # One video is not worth a batch of copies.
    generator = dataclasses.replace(generator, config=dataclasses.replace(generator.config, batch_size=1))
    if generator.call and generator.shape(request.size)[0] > generator.call:
        yield from _by_schedule(generator, request, watch, keep)
        return
    codec, tokenizer = generator.model.codec, generator.tokenizer
    stride = codec.tokenizer.config.strides[0]
    total, *place = generator.shape(request.size)
    size = min(generator.longest, total)
    if size == 1 < total:
        raise UserError("This model makes pictures; of a video, frames after the first can't be made.")
    plan = windows(total, size, observed_frames(size))
    cache, latest = None, np.zeros((0, *place), np.float32)  # the last window's latents
    last_frames: list[UInt8[np.ndarray, "h w 3"]] = []  # of those, the last frame each
    for number, window in enumerate(plan):
        frames = 1 + (size - 1) * stride
        latents = np.zeros((size, *place), np.float32)
        until = np.full((*latents.shape[:-1], 1), NEVER, np.float32)
        if request.given is not None:
            latents = np.array(request.given.latents[window.start : window.stop])
            until = np.array(request.given.until[window.start : window.stop])
        if window.done:
            anchor = last_frames[-window.done]
            latents[0] = fetched(together(codec.encode, tokenizer, anchor[None, None])[0])[0, 0]
            latents[1 : window.done] = latest[len(latest) - window.done + 1 :]
            until[: window.done] = 0
        seed = request.seed if number == 0 else seed_of_call(request.seed, number)
        one = dataclasses.replace(request, seed=seed, size=(frames, *request.size[1:]), given=Given(latents, until))
        if low_res is not None:
            one = dataclasses.replace(one, low_res=low_res(window))
        [latest] = generator.latents([one], bar=False, watch=watch)
        new = latest[window.done :]
        keep(range(window.start + window.done, window.stop), new)
        decoded, cache = together(codec.decode, tokenizer, new[None], cache)
        shown = fetched(decoded)[0]
        last_frames = [*last_frames, *shown[group_ends(len(shown), stride)]][-size:]
        yield Segment(new, shown)


def group_ends(frames: int, stride: int) -> range:
    """Of a segment's frames, the last one of each latent frame: the video's first frame is one, then `stride` are."""
    return range((frames - 1) % stride, frames, stride)


def _by_schedule(generator: Generator, request: Request, watch: Watch | None, keep: Keep) -> Iterator[Segment]:
    """A segment for each latent frame, in the video's order; those that are made before their turn wait."""
    codec, tokenizer, cache = generator.model.codec, generator.tokenizer, None
    given = range(leading(request.given))
    ahead = {frame: request.given.latents[frame] for frame in given}
    if given:
        keep(given, request.given.latents[: len(given)])
    sample = functools.partial(generator.latents, bar=False, watch=watch)
    shape, decoded = generator.shape(request.size), 0
    made = calls(sample, [request], shape, generator.call, generator.schedule)
    while decoded < shape[0]:
        while decoded not in ahead:
            stage, [latents] = next(made)
            keep(stage.made, latents)
            ahead |= zip(stage.made, latents, strict=True)
        latent = ahead.pop(decoded)[None]
        shown, cache = together(codec.decode, tokenizer, latent[None], cache)
        decoded += 1
        yield Segment(latent, fetched(shown)[0])


def make(generator: Generator, requests: Sequence[Request]) -> list[UInt8[np.ndarray, "t h w 3"]]:
    """Videos of one size and of any length, with all of their frames in memory."""
    if generator.shape(requests[0].size)[0] <= generator.longest:
        return generator.generate(requests, bar=True)
    return [np.concatenate([segment.frames for segment in segments(generator, one)]) for one in requests]
