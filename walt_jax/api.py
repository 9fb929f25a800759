"""The Python API: what `walt_jax.load` returns, and the arrays of video that it gives."""

import base64
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import tqdm.auto
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from walt_jax.command_line import MAX_STEPS
from walt_jax.data.media import write_video
from walt_jax.data.pipeline import Source
from walt_jax.data.video import ClipError, frame_rate, read_frames
from walt_jax.errors import UserError
from walt_jax.evaluation.evaluate import evaluate
from walt_jax.generation.asking import Ask, Condition, Extend, resolve
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.long_video import make
from walt_jax.generation.request import MAX_SEED, Request
from walt_jax.parallel.mesh import on
from walt_jax.training.run_config import RunConfig

READABLE = 192  # height of a video in a notebook, in pixels, at least


class Video(np.ndarray):
    """Frames, an array of uint8 [t, h, w, 3] or [n, t, h, w, 3]; a notebook shows it as video.

    Attributes:
        fps: frames a second.
    """

    fps: float

    def __new__(cls, frames: UInt8[np.ndarray, "*n t h w 3"], fps: float) -> "Video":
        video = np.asarray(frames).view(cls)
        video.fps = float(fps)
        return video

    def __array_finalize__(self, source: Any) -> None:
        self.fps = getattr(source, "fps", 8.0)

    def _repr_html_(self) -> str | None:
        """The video, as notebooks show it; None, so that they print the array, where this is not frames any more."""
        if self.dtype != np.uint8 or self.ndim not in (4, 5) or self.shape[-1] != 3 or 0 in self.shape:
            return None
        return " ".join(map(self._element, np.asarray(self if self.ndim == 5 else self[None])))

    def _element(self, frames: UInt8[np.ndarray, "t h w 3"]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "clip.mp4"
            write_video(file, frames, self.fps)
            content = base64.b64encode(file.read_bytes()).decode()
        height = max(READABLE, frames.shape[1])
        return (
            f'<video controls autoplay loop muted playsinline height="{height}" '
            f'src="data:video/mp4;base64,{content}"></video>'
        )


class TrainedModel:
    """A trained run: samples, reconstructs and evaluates. `walt_jax.load` makes it.

    Attributes:
        config: see `RunConfig`.
    """

    def __init__(
        self,
        config: RunConfig,
        codec: Codec,
        mesh: Mesh,
        tokenizer: Callable[[], TrainedTokenizer],
        generator: Callable[[], Generator],
        unseen: Callable[[], Source],
    ):
        self.config, self._codec, self._mesh = config, codec, mesh
        self._make_tokenizer, self._make_generator, self._unseen = tokenizer, generator, unseen

    @functools.cached_property
    def _tokenizer(self) -> TrainedTokenizer:
        return self._make_tokenizer()

    @functools.cached_property
    def generator(self) -> Generator:
        """What samples, for requests that `sample` has no arguments for.

        Raises:
            UserError: if the model is only a tokenizer.
        """
        return self._make_generator()

    def _on_mesh(self) -> contextlib.AbstractContextManager[None]:
        return on(self._mesh, self.config.rules)

    def sample(
        self,
        prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        negative_prompt: str = "",
        conditions: Sequence[Condition] = (),
        mask: str | None = None,
        extend: Extend | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        motion: float = 0.0,
    ) -> Video:
        """Generates video of prompts. A video depends on its own prompt and seed only.

        Args:
            prompt: a caption or a class's name; several give several videos.
            seed: of each video, or one for all.
            negative_prompt: what guidance leads away from.
            conditions: pictures and clips that are given, see `walt_jax.Condition`.
            mask: a file, white where the video is made anew.
            extend: how the first condition goes on: "forward", "backward", "loop".
            num_frames, height, width: of the video; those of the training clips by default.
            steps, guidance: of the config by default.
            motion: strength with which frames between what is given follow the motion from one to the other.

        Returns:
            uint8 [t, h, w, 3]; of several prompts [n, t, h, w, 3].

        Raises:
            UserError: if the model is only a tokenizer, or upscales clips; if a prompt is not one of its classes; if
                something that is given can't be read or does not fit; if an argument is of another kind.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        seeds = list(seed) if isinstance(seed, list | tuple | np.ndarray) else [seed] * len(prompts)
        if not prompts or len(seeds) != len(prompts):
            raise UserError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; give as many, at least one.")
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        how = {"extend": extend, "steps": steps, "guidance": guidance, "motion": motion}
        _check(prompt=prompts, seed=seeds, conditions=conditions, **sizes, **how)
        generator = self.generator
        if generator.low_res is not None:
            raise UserError("This model upscales clips, and a prompt has none; evaluate upscales unseen clips.")
        config, data = generator.config, self.config.data
        scale = config.guidance.scale if guidance is None else guidance
        guided = dataclasses.replace(config.guidance, scale=scale)
        config = dataclasses.replace(config, steps=steps or config.steps, guidance=guided)
        generator = dataclasses.replace(generator, config=config)
        ask = Ask(data.fps, conditions, mask, extend, num_frames, height, width, motion)
        with self._on_mesh():
            asked = resolve(generator, ask, (data.frames, data.height, data.width))
            for note in asked.notes:
                warnings.warn(note, stacklevel=2)
            requests = [
                Request(text, number, negative_prompt, asked.size, asked.given)
                for text, number in zip(prompts, seeds, strict=True)
            ]
            clips = np.stack([clip[asked.shown] for clip in make(generator, requests)])
        return Video(clips[0] if isinstance(prompt, str) else clips, data.fps)

    def reconstruct(self, video: str | pathlib.Path | UInt8[np.ndarray, "t h w 3"]) -> Video:
        """Encodes and decodes a video in chunks; any size and length.

        Args:
            video: a file, or frames.

        Returns:
            uint8 [t, h, w, 3] of the same shape.

        Raises:
            UserError: if it can't be read.
        """
        fps, frames = self._frames(video)
        with self._on_mesh(), self._reading(video):
            done = list(self._codec.stream(self._tokenizer, tqdm.auto.tqdm(frames, "reconstructing", unit="frame")))
        return Video(np.stack(done), fps)

    def encode(self, video: str | pathlib.Path | UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t2 h2 w2 c"]:
        """The latents of a video, normalised: what the denoiser is trained on.

        Raises:
            UserError: if it can't be read, or the tokenizer's strides don't divide it.
        """
        _, frames = self._frames(video)
        with self._on_mesh(), self._reading(video):
            clip = np.stack(list(frames))
            try:
                self._codec.tokenizer.config.latent_shape(*clip.shape[:3])
            except ValueError as error:
                raise UserError(f"A video can't be encoded: {error}; crop it, or use reconstruct.") from error
            return np.asarray(self._codec.encode(self._tokenizer, clip[None])[0][0])

    def decode(self, latents: Float[np.ndarray, "t2 h2 w2 c"]) -> Video:
        """The video of latents that `encode` has returned: uint8 [t, h, w, 3].

        Raises:
            UserError: if they have another number of axes or channels.
        """
        latents, channels = np.asarray(latents, np.float32), self.config.tokenizer.latent_channels
        if latents.ndim != 4 or latents.shape[3] != channels or 0 in latents.shape:
            raise UserError(
                f"Latents of shape {latents.shape} can't be decoded; give [t, h, w, {channels}], as encode returns."
            )
        with self._on_mesh():
            return Video(self._codec.decode(self._tokenizer, latents[None])[0][0], self.config.data.fps)

    def evaluate(self, out: str | pathlib.Path | None = None) -> list[dict[str, Any]]:
        """Measures every metric of the config on its unseen clips.

        Args:
            out: a folder for `evaluate.json`, plots and samples; None writes none.

        Returns:
            The metrics: {"name", "value", "unit", "protocol"} each.

        Raises:
            UserError: if the config's data can't be read, or the folder can't be made.
        """
        config = self.config
        generator = self.generator if config.denoiser else None
        with tempfile.TemporaryDirectory() as temporary, self._on_mesh():
            folder = pathlib.Path(out or temporary)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder} can't be made ({error.strerror}); name another folder.") from error
            what = self._tokenizer, generator, self._unseen(), config.data, config.evaluation
            return evaluate(folder, self._codec, *what)

    def _frames(self, video: Any) -> tuple[float, Iterator[UInt8[np.ndarray, "h w 3"]]]:
        """(frames a second, the frames) of a file or an array."""
        if isinstance(video, str | pathlib.Path):
            with self._reading(video):
                fps = frame_rate(str(video))
                return fps, read_frames(str(video), fps)
        frames = np.asarray(video)
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise UserError(
                f"A video of {frames.dtype} {list(frames.shape)} can't be read; give uint8 [t, h, w, 3], or a file."
            )
        return getattr(video, "fps", self.config.data.fps), iter(frames)

    @contextlib.contextmanager
    def _reading(self, video: Any) -> Iterator[None]:
        try:
            yield
        except ClipError as error:
            raise UserError(f"{video} can't be read: {error}.") from error


def _check(**arguments: Any) -> None:
    """Checks arguments of `sample`.

    Raises:
        UserError: if one is of another kind, or out of range.
    """

    def whole(least: int, most: int) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, int | np.integer) and least <= value <= most

    def conditions(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(each, Condition) for each in value)

    side = whole(1, MAX_SEED), "a whole number above 0"
    number = (lambda value: isinstance(value, int | float | np.number)), "a number"
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "prompt": (lambda value: all(isinstance(text, str) for text in value), "a text, or a list of them"),
        "seed": (lambda value: all(map(whole(0, MAX_SEED), value)), f"whole numbers from 0 to {MAX_SEED}"),
        "conditions": (conditions, 'a list such as [walt_jax.Condition("first.png")]'),
        "extend": (lambda value: value in get_args(Extend), " or ".join(get_args(Extend))),
        "steps": (whole(1, MAX_STEPS), f"a whole number from 1 to {MAX_STEPS}"),
        **dict.fromkeys(("num_frames", "height", "width"), side),
        **dict.fromkeys(("guidance", "motion"), number),
    }
    for name, value in arguments.items():
        fits, wanted = rules[name]
        if value is not None and not fits(value):
            raise UserError(f"{name}={value!r} can't be taken; give {wanted}.")
