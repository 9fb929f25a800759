"""Samples what was asked for into a folder: clips in batches, long videos as streams."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm.auto
from jaxtyping import Float

from walt_jax.generation.asking import Ask, Resolved, resolve
from walt_jax.generation.cascade import is_long, upscaled, upscaled_segments, upscaled_size
from walt_jax.generation.content_credentials import Sign
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Request, Size
from walt_jax.generation.sample import Samples, shown_frames
from walt_jax.parallel.processes import is_first


def sample_files(
    generator: Generator,
    ask: Ask,
    pixels: Size,
    prompts: Sequence[tuple[str, int]],
    negative_prompt: str,
    out: pathlib.Path,
    gif: bool = False,
    tags: bool = True,
    cascade: Sequence[Generator] = (),
    made_with: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Any] | None = None,
    sign: Sign | None = None,
) -> int:
    """Writes a video for each prompt and seed; notes on what was fitted go to the standard error output.

    Videos that are longer than the clips of one of the models are made window by window; their latents, those of the
    cascade's last model, are in `latents/` before their frames are decoded.

    Args:
        generator, ask, pixels: as `asking.resolve` has them.
        prompts: (prompt, seed) of each video.
        negative_prompt: for all.
        out: the folder, see `Samples`.
        gif: whether files are written as GIFs too.
        tags: whether files have tags.
        cascade: super-resolution models that upscale the videos, in order.
        made_with: more of the settings that `samples.json` and the tags state.
        made_by: the models, for the file beside each video; None leaves it out.
        sign: see `Samples`.

    Returns:
        The number of videos.

    Raises:
        UserError: as `asking.resolve`.
    """
    asked = resolve(generator, ask, pixels)
    for note in asked.notes:
        print(f"note: {note}.", file=sys.stderr)
    requests = [Request(prompt, seed, negative_prompt, asked.size, asked.given) for prompt, seed in prompts]
    by_segment = is_long(generator, cascade, asked.size)
    suffixes = (".mp4", ".gif") if gif and not by_segment else (".mp4",)
    settings = _settings(generator, ask, negative_prompt) | dict(made_with or {})
    if generator.call and generator.shape(asked.size)[0] > generator.longest:
        settings["schedule"] = generator.schedule
    samples = Samples(out, ask.fps, suffixes, settings, tags, made_by, sign)
    try:
        if by_segment:
            _long(generator, cascade, requests, asked, samples)
        else:
            for request, clip in _clips(generator, requests, cascade):
                samples.add(clip[asked.shown], request.prompt, request.seed)
    finally:
        if samples.rows:
            samples.sheet()
    return len(samples.rows)


def _settings(generator: Generator, ask: Ask, negative_prompt: str) -> dict:
    """What `samples.json` and the files' tags say beside prompt and seed."""
    config = generator.config
    found = {"fps": ask.fps, "steps": config.steps, "sampler": config.sampler, "guidance": config.guidance.scale}
    if negative_prompt:
        found["negative_prompt"] = negative_prompt
    if ask.conditions:
        found["conditions"] = [
            {**dataclasses.asdict(one), "file": pathlib.Path(one.file).name} for one in ask.conditions
        ]
    if ask.mask:
        found["mask"] = pathlib.Path(ask.mask).name
    if ask.extend:
        found["extend"] = ask.extend
    if ask.motion:
        found["motion"] = ask.motion
    return found


def _clips(
    generator: Generator, requests: list[Request], cascade: Sequence[Generator]
) -> Iterator[tuple[Request, np.ndarray]]:
    """Videos in the order of their requests, batch by batch, so that those made are written when others fail."""
    size = generator.config.batch_size
    with tqdm.auto.tqdm(total=len(requests), desc="sampling", unit="clip", disable=len(requests) <= size) as progress:
        for first in range(0, len(requests), size):
            some = requests[first : first + size]
            latents = generator.latents(some, bar=False)
            if cascade:
                latents = upscaled(generator, cascade, some, latents)
            yield from zip(some, [generator, *cascade][-1].decode(latents), strict=True)
            progress.update(len(some))


def _long(
    generator: Generator, cascade: Sequence[Generator], requests: list[Request], asked: Resolved, samples: Samples
) -> None:
    size = upscaled_size(asked.size, cascade)
    shape, shown = [generator, *cascade][-1].shape(size), range(*asked.shown.indices(size[0]))
    for number, request in enumerate(requests):
        name = f"latents/{samples.name(request.prompt, request.seed)}.npy"
        title = f"video {number + 1} of {len(requests)}"
        with (
            _Latents(samples.out / name, shape) as latents,
            tqdm.auto.tqdm(total=size[0], desc=title, unit="frame") as progress,
        ):
            made = upscaled_segments(generator, cascade, request, latents.add)
            frames = shown_frames(made, shown, progress.update)
            samples.add_stream(frames, (len(shown), *size[1:]), request.prompt, request.seed, latents=name)


class _Latents:
    """A .npy file that fills while a video is made; what is not made yet is NaN. Memory does not grow.

    It begins with the first latents: a video that was stopped before leaves none.
    """

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...]):
        self._path, self._shape, self._array = path, shape, None

    def __enter__(self) -> "_Latents":
        return self

    def add(self, frames: Sequence[int], latents: Float[np.ndarray, "k h w c"]) -> None:
        """Writes latent frames to their places."""
        if not is_first():
            return
        if self._array is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._array = np.lib.format.open_memmap(self._path, "w+", np.float32, self._shape)
            for number in range(len(self._array)):
                self._array[number] = np.nan
        for frame, one in zip(frames, latents, strict=True):
            self._array[frame] = one
        self._array.flush()

    def __exit__(self, *error: object) -> None:
        self._array = None
