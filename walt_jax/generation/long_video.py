"""Videos longer than the model makes at once: segments that hand on latents and the decoder's cache.

Each segment's window begins with the frame before it, encoded as a picture, for a window's first latent frame is one
frame alone; then come latent frames that were made before, as they are; the rest is new. New latents are decoded with
the cache of those before, once: nothing that is seen was decoded and encoded again, which blurs and shifts colours.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator, Watch
from walt_jax.generation.latent_diffusion import NEVER
from walt_jax.generation.request import Given, Request
from walt_jax.parallel.processes import fetched, together


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
    """What a window adds to a video."""

    latents: Float[np.ndarray, "t2 h2 w2 c"]
    frames: UInt8[np.ndarray, "t h w 3"]


def segments(generator: Generator, request: Request, watch: Watch | None = None) -> Iterator[Segment]:
    """Makes a video of any length, window by window, in memory that does not grow with it.

    Args:
        generator: see `Generator`.
        request: of a video that is longer than the model's clips; what is given of it is read as it is needed.
        watch: see `Generator.latents`.

    Raises:
        UserError: if the model makes pictures.
    """
    # One video is not worth a batch of copies.
    generator = dataclasses.replace(generator, config=dataclasses.replace(generator.config, batch_size=1))
    codec, tokenizer = generator.model.codec, generator.tokenizer
    stride = codec.tokenizer.config.strides[0]
    total, *place = generator.shape(request.size)
    size = generator.longest
    if size == 1:
        raise UserError("This model makes pictures; of a video, frames after the first can't be made.")
    plan = windows(total, size, min(max(2, size // 2), size - 1))
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
        seed = request.seed if number == 0 else _seed(request.seed, number)
        one = dataclasses.replace(request, seed=seed, size=(frames, *request.size[1:]), given=Given(latents, until))
        [latest] = generator.latents([one], bar=False, watch=watch)
        new = latest[window.done :]
        decoded, cache = together(codec.decode, tokenizer, new[None], cache)
        shown = fetched(decoded)[0]
        ends = range(0 if window.done == 0 else stride - 1, len(shown), stride)
        last_frames = [*last_frames, *(shown[end] for end in ends)][-size:]
        yield Segment(new, shown)


def make(generator: Generator, requests: Sequence[Request]) -> list[UInt8[np.ndarray, "t h w 3"]]:
    """Videos of one size and of any length, with all of their frames in memory."""
    if generator.shape(requests[0].size)[0] <= generator.longest:
        return generator.generate(requests, bar=True)
    return [np.concatenate([segment.frames for segment in segments(generator, one)]) for one in requests]


def _seed(seed: int, number: int) -> int:
    """A seed of its own for each window."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
