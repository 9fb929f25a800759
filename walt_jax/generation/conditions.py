"""What is given of a video: pictures and clips at frames of it, with strengths and a mask, as one canvas.

Text-to-video with a first picture, a last one, several, a clip that goes on, in- and outpainting, and editing are the
same: frames × where they are given × how strongly. A latent position is given where all of its pixels are.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import NEVER
from walt_jax.generation.motion import between

Frames = UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or a clip that is given.

    Attributes:
        frames: in the video's height and width.
        start: the frame of the video where it begins; negative from the end: -1 is the last frame.
        strength: 1 is kept; below, it is followed down to the diffusion time 1 − strength, and free after (SDEdit,
            Meng et al. 2021, where it covers all of the video).
        name: of its file, for messages.
    """

    frames: Frames
    start: int = 0
    strength: float = 1.0
    name: str = "what is given"


class Canvas(NamedTuple):
    """A video of which parts are given.

    Attributes:
        video: frames that nothing is given of repeat the nearest given one, so that what is next to them is encoded
            as in a video that stands still there.
        strength: of each pixel; 0 where nothing is given.
        notes: what was changed to make it fit, a sentence each.
    """

    video: Frames
    strength: Float[np.ndarray, "t h w"]
    notes: list[str]


def place(
    media: Sequence[Media],
    size: tuple[int, int, int],
    stride: int,
    generated: Bool[np.ndarray, "#t h w"] | None = None,
    motion: float = 0.0,
) -> Canvas:
    """Puts media onto a video; where they overlap, later ones count.

    A latent frame after the first is made of `stride` frames, so that a single picture after frame 0 stands still for
    those of its latent frame; with `motion`, they lead to it.

    Args:
        media: what is given.
        size: (frames, height, width) of the video.
        stride: frames of a latent frame.
        generated: where nothing is given, whatever the media have there.
        motion: strength of rough frames along the motion between media, see `motion.between`; 0 gives none.

    Raises:
        UserError: if a frame or a strength is out of range, all is given, or motion has nothing to lie between.
    """
    frames, height, width = size
    video = np.zeros((*size, 3), np.uint8)
    strength, notes = np.zeros(size, np.float32), []
    covered = np.zeros(frames, bool)
    for one in media:
        if not 0 <= one.strength <= 1:
            raise UserError(f"The strength of {one.name} is {one.strength:g}; give one from 0 to 1.")
        start = one.start + frames if one.start < 0 else one.start
        if not 0 <= start < frames:
            raise UserError(
                f"{one.name} is placed at frame {one.start}, and the video has frames 0 to {frames - 1} (-{frames} to "
                "-1 from its end); place it there, or make the video longer with --num_frames."
            )
        if one.frames.shape[1:3] != (height, width):
            raise UserError(
                f"{one.name} is {one.frames.shape[1]} × {one.frames.shape[2]} and the video {height} × {width}; give "
                "frames of the video's size."
            )
        shown = one.frames
        if len(shown) == 1 and start > 0:
            first = (start - 1) // stride * stride + 1
            last = min(first + stride, frames) - 1
            if motion:
                strength[first : last + 1] = one.strength
            else:
                start, shown = first, shown.repeat(last + 1 - first, axis=0)
                notes.append(f"{one.name} stands still in frames {first} to {last}, one latent frame")
        if start + len(shown) > frames:
            notes.append(f"of {one.name} the first {frames - start} frames of {len(shown)} are used")
            shown = shown[: frames - start]
        video[start : start + len(shown)] = shown
        end = start + len(shown)
        strength[start:end], covered[start:end] = one.strength, True
        whole = [group for group in latent_groups(frames, stride) if start <= group.start and group.stop <= end]
        if len(shown) > 1 and sum(group.stop - group.start for group in whole) < len(shown):
            notes.append(
                f"{one.name} is given for frames {start} to {end - 1}; those that fill no whole latent "
                f"frame (frame 0, then {stride} each) are generated"
            )
    if motion:
        gaps = _gaps(covered)
        if not gaps:
            raise UserError(
                "Motion leads from what is given to what is given later, and here no frame lies between; give two "
                "pictures or clips, such as a first and a last one."
            )
        for gap in gaps:
            video[gap] = between(video[gap.start - 1], video[gap.stop], gap.stop - gap.start)
            strength[gap] = np.where(strength[gap] > 0, strength[gap], motion)
            covered[gap] = True
            notes.append(f"frames {gap.start} to {gap.stop - 1} follow the motion between what is given")
    if generated is not None:
        strength = np.where(generated, 0, strength)
    if (strength == 1).all():
        raise UserError(
            f"All of the {frames} × {height} × {width} video is given, so there is nothing to generate; extend it, "
            "mask a part of it, or give a strength below 1."
        )
    return Canvas(_held(video, covered), strength, notes)


def _gaps(covered: Bool[np.ndarray, " t"]) -> list[slice]:
    """Frames that nothing is given of, between some that are given."""
    there = np.flatnonzero(covered)
    return [slice(int(a) + 1, int(b)) for a, b in itertools.pairwise(there) if b - a > 1]


def _held(video: Frames, given: Bool[np.ndarray, " t"]) -> Frames:
    """The video in which each frame that is not given repeats the given one before it, or else the first."""
    if not given.any():
        return video
    nearest = np.where(given, np.arange(len(video)), -1)
    nearest = np.maximum.accumulate(nearest)
    return video[np.where(nearest < 0, np.flatnonzero(given)[0], nearest)]


def latent_groups(frames: int, stride: int) -> list[slice]:
    """The frames of each latent frame: the first alone, then `stride` each."""
    return [slice(0, 1), *(slice(start, start + stride) for start in range(1, frames, stride))]


def until(strength: Float[np.ndarray, "t h w"], strides: tuple[int, int, int]) -> Float[np.ndarray, "t2 h2 w2 1"]:
    """The time down to which each latent position is given, see `LatentDiffusion.sample`: that of its weakest pixel."""
    stride, *space = strides
    rows = np.stack([strength[group].min(axis=0) for group in latent_groups(len(strength), stride)])
    t, h, w = rows.shape
    weakest = rows.reshape(t, h // space[0], space[0], w // space[1], space[1]).min(axis=(2, 4))
    return np.where(weakest == 0, NEVER, 1 - weakest)[..., None].astype(np.float32)


class Extension(NamedTuple):
    """A clip that is to go on.

    Attributes:
        media: what is given of the longer video.
        frames: of the longer video.
        shown: those that are kept.
        notes: what was changed to make it fit.
    """

    media: list[Media]
    frames: int
    shown: slice
    notes: list[str]


def extend(kind: str, clip: Media, frames: int | None, longest: int, stride: int) -> Extension:
    """Places a clip in a longer video.

    Args:
        kind: "forward", "backward", or "loop": the end of the video leads back to its first frame.
        clip: frames in the video's size.
        frames: of the video that is made; by default half of `longest` more than the clip's.
        longest: frames that the model makes at once.
        stride: frames of a latent frame.

    Raises:
        UserError: if the video is not longer than the clip.
    """
    have, notes = len(clip.frames), []
    if kind == "backward":
        # The last latent frames have `stride` frames each.
        usable = have // stride * stride
        if not usable:
            raise UserError(f"{clip.name} has {have} frames; at least {stride} can be extended backward.")
        shown = clip.frames[:usable]
    else:
        usable = 1 + (have - 1) // stride * stride
        shown = clip.frames[have - usable :] if kind == "forward" else clip.frames[:usable]
    if usable < have:
        notes.append(f"of {clip.name} {usable} frames of {have} are used, whole latent frames")
    more = max(1, (longest - 1) // stride // 2) * stride
    total = frames or _whole(usable + more, stride)
    if total <= usable:
        raise UserError(
            f"The video of {total} frames would not be longer than {clip.name}, of which {usable} are used; give "
            f"--num_frames={_whole(usable + more, stride)}, or leave it out."
        )
    clip = dataclasses.replace(clip, frames=shown, start=total - usable if kind == "backward" else 0)
    if kind != "loop":
        return Extension([clip], total, slice(0, total), notes)
    # After the last frame comes the first again: the video is made with its first frames at its end, which are cut off.
    again = shown[:stride] if usable >= stride else shown[:1].repeat(stride, axis=0)
    timeline = _whole(total + stride, stride)
    end = dataclasses.replace(clip, frames=again, start=timeline - stride, name=f"the start of {clip.name}")
    return Extension([clip, end], timeline, slice(0, timeline - stride), notes)


def _whole(frames: int, stride: int) -> int:
    """The least 1 + k·stride that is no less."""
    return 1 + -(-(frames - 1) // stride) * stride
