"""From what a user gives — files, frames, strengths, sizes — to what the model is asked for."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.data import video
from walt_jax.errors import UserError
from walt_jax.generation import conditions
from walt_jax.generation.codec import Codec, TrainedTokenizer, chunks
from walt_jax.generation.generator import Generator
from walt_jax.generation.media_files import Reader, read_mask, read_media
from walt_jax.generation.request import Given, Size
from walt_jax.parallel.processes import fetched, together

Extend = Literal["forward", "backward", "loop"]
ENCODED_AT_ONCE = 4  # latent frames


@dataclasses.dataclass(frozen=True)
class Condition:
    """A picture or clip that is given.

    Attributes:
        file: its path.
        frame: of the video, where it begins; negative from the end.
        strength: see `conditions.Media`.
        picture: whether only its first frame is given.
    """

    file: str
    frame: int = 0
    strength: float = 1.0
    picture: bool = False

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """FILE[@FRAME[:STRENGTH]].

        Raises:
            UserError: if it is something else.
        """
        file, at, place = text.rpartition("@")
        if not at or pathlib.Path(text).exists():  # names of files may have an @
            file, place = text, "0"
        frame, colon, strength = place.partition(":")
        try:
            if file:
                return cls(file, int(frame), float(strength) if colon else 1.0)
        except ValueError:
            pass
        raise UserError(
            f"--condition={text} can't be read; write FILE, FILE@FRAME or FILE@FRAME:STRENGTH, such as last.png@-1 or "
            "clip.mp4@0:0.6."
        )


@dataclasses.dataclass(frozen=True)
class Ask:
    """How a video is asked for, but for prompt and seed.

    Attributes:
        conditions: what is given.
        mask: a file, white where the video is generated.
        extend: how the first condition goes on.
        frames, height, width: of the video; None is the model's, for a clip that goes on or is edited its own length.
        fps: frames a second.
        motion: strength of rough frames along the motion between what is given, see `conditions.place`; 0: none.
    """

    fps: float
    conditions: Sequence[Condition] = ()
    mask: str | None = None
    extend: Extend | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    motion: float = 0.0


class Resolved(NamedTuple):
    """What the model is asked for.

    Attributes:
        size: of what it makes.
        given: latents that are given, or None.
        shown: which of its frames are kept.
        notes: what was changed to make it fit.
    """

    size: Size
    given: Given | None
    shown: slice
    notes: list[str]


def resolve(generator: Generator, ask: Ask, pixels: Size, reader: Reader = video) -> Resolved:
    """Reads what is given, fits it, and encodes it.

    Args:
        generator: see `Generator`.
        ask: see `Ask`.
        pixels: (frames, height, width) of the model's own clips.
        reader: of files.

    Raises:
        UserError: if something can't be read, does not fit, or the model can't make it.
    """
    longest, height, width = pixels
    height, width = ask.height or height, ask.width or width
    generator.shape((ask.frames or longest, height, width))  # raises
    stride = generator.model.codec.tokenizer.config.strides[0]
    if ask.mask and not ask.conditions:
        raise UserError("A mask says which part of a clip is generated; give the clip with --video or --condition.")
    if not 0 <= ask.motion <= 1:
        raise UserError(f"The strength of motion is {ask.motion:g}; give one from 0 to 1.")
    if ask.motion and not ask.conditions:
        raise UserError("Motion leads from one given picture or clip to another; give two, such as a first and a last.")
    media, notes = [], []
    for one in ask.conditions:
        frames, more = read_media(one.file, height, width, ask.fps, picture=one.picture, reader=reader)
        media.append(conditions.Media(frames, one.frame, one.strength, one.file.rsplit("/", 1)[-1]))
        notes += more
    frames, shown = ask.frames, slice(None)
    if ask.extend:
        if len(media) != 1:
            raise UserError(f"--extend={ask.extend} goes on with one clip; give one, with --video.")
        extension = conditions.extend(ask.extend, media[0], ask.frames, longest, stride)
        media, frames, shown = extension.media, extension.frames, extension.shown
        notes += extension.notes
    elif frames is None:
        # A clip that is edited or of which a part is made anew keeps its length.
        edited = [len(one.frames) for one in media if ask.mask or one.strength < 1]
        frames = 1 + (max(edited) - 1) // stride * stride if edited and max(edited) > 1 else longest
    size = frames, height, width
    generator.shape(size)
    if not media:
        return Resolved(size, None, shown, notes)
    mask = None
    if ask.mask:
        mask, more = read_mask(ask.mask, size, ask.fps, reader)
        notes += more
    canvas = conditions.place(media, size, stride, mask, ask.motion)
    until = conditions.until(canvas.strength, generator.model.codec.tokenizer.config.strides)
    notes += canvas.notes
    if (until > 1).all():
        raise UserError(
            "Nothing of what is given fills a whole latent position, "
            f"{' × '.join(map(str, generator.model.codec.tokenizer.config.strides))} pixels; give more of it."
        )
    latents = encoded(generator.model.codec, generator.tokenizer, canvas.video)
    return Resolved(size, Given(latents, until), shown, notes)


def encoded(
    codec: Codec, tokenizer: TrainedTokenizer, video: UInt8[np.ndarray, "t h w 3"]
) -> Float[np.ndarray, "t2 h2 w2 c"]:
    """Normalised latents of a clip of any length, encoded in chunks."""
    stride = codec.tokenizer.config.strides[0]
    cache, found = None, []
    for chunk in chunks(video, 1 + ENCODED_AT_ONCE * stride, ENCODED_AT_ONCE * stride):
        latents, cache = together(codec.encode, tokenizer, np.stack(chunk)[None], cache)
        found.append(fetched(latents)[0])
    return np.concatenate(found)
