"""Reads a video file into an array of frames: any format, any frame rate, and whatever decodes of a damaged file."""

import contextlib
import itertools
import math
import statistics
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from etils import epath

# A longer silence between two time stamps is a broken clock: believing it would fill memory with one repeated frame.
LONGEST_GAP_SECONDS = 10

# What a frame lasts in a file that says nothing about time at all.
DEFAULT_GAP_SECONDS = Fraction(1, 25)

HIGHEST_RATE = 240  # frames per second; a header that says more means its clock's ticks

# swscale widens the bicubic kernel when it shrinks a picture, so this is antialiased. The flags are for exactness:
# without full chroma interpolation white comes out as 253.
RESIZE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class ClipError(Exception):
    """A file that cannot give frames. The message is the short reason, without the file's path."""


def read_clip(
    path: epath.PathLike,
    fps: float | None = None,
    max_frames: int | None = None,
    short_side: int | None = None,
    cover: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decodes a video, an animated picture or a still picture.

    The clock is the time stamps, not the rate in the header: output frame k is the one on screen k / fps seconds after
    the first frame, and the last frame stays as long as it says. Frames come upright, and alpha is dropped. A packet
    that does not decode loses only its own frames; the frame before stays on screen in their place.

    Args:
      path: a file of any format that FFmpeg reads, local or remote (`etils.epath`).
      fps: output frames per second; None gives every decoded frame once.
      max_frames: stops decoding when there are as many.
      short_side: the output's shorter side in pixels; the aspect ratio is kept. None keeps the size.
      cover: (height, width) in pixels instead of `short_side`: the smallest output with the aspect ratio kept that is
        at least so high and so wide; `short_side=s` means `cover=(s, s)`.

    Returns:
      uint8 [t, h, w, 3], RGB, with t ≥ 1. Where the size changes within the file, later frames are stretched to the
      first one's.

    Raises:
      ClipError: the file gives no frame.
    """
    if short_side is not None:
        cover = (short_side, short_side)
    return np.stack(list(itertools.islice(read_frames(path, fps, cover), max_frames)))


def read_frames(
    path: epath.PathLike, fps: float | Fraction | None = None, cover: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """`read_clip` frame by frame, in the memory of a few: uint8 [h, w, 3] each, at least one.

    Raises:
      ClipError: the file gives no frame; on reading the first.
    """
    frames = _decode(path)
    shown = ((frame, 1) for frame in frames) if fps is None else _resample(frames, Fraction(fps))
    reformatter = VideoReformatter()
    picture, size = None, None
    try:
        for frame, count in shown:
            size = size or _covering(*_upright_size(frame), cover)
            if not count:
                continue
            try:
                picture = _to_rgb(frame, size, reformatter)
            except av.FFmpegError as error:  # damage that only shows now: as if the frame had not decoded
                if picture is None:
                    raise ClipError(f"its frames don't convert to RGB: {error.strerror}") from error
            yield from itertools.repeat(picture, count)
    finally:
        frames.close()


def frame_rate(path: epath.PathLike) -> Fraction:
    """Frames per second as the header has them, or a usual rate where that can't be.

    Raises:
      ClipError: the file is no video.
    """
    with _opened(path) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
    return rate if rate and 1 <= rate <= HIGHEST_RATE else 1 / DEFAULT_GAP_SECONDS


def _decode(path: epath.PathLike) -> Iterator[av.VideoFrame]:
    """Yields the frames of the first video stream in the order in which they are shown."""
    with _opened(path) as (container, stream):
        yield from _recover(container, stream)


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file's container and its first video stream."""
    try:
        file = epath.Path(path).open("rb")
    except OSError as error:
        raise ClipError(f"it can't be opened: {error.strerror}") from error
    with file:
        # An open file rather than a path: remote files work, and a name with a colon is not taken for a protocol.
        try:
            if not file.read(1):
                raise ClipError("empty file")
            file.seek(0)
            container = av.open(file, metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"not a video: {error.strerror}") from error
        with container:
            # The cover picture of a sound file is a video stream too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ClipError("no video stream")
            yield container, streams[0]


def _recover(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields every frame that can be had; `container.decode` would stop at the first bad packet."""
    decoded, reason = 0, None
    # Where the container breaks off, the decoder still holds frames; None asks for them.
    packets = itertools.chain(container.demux(stream), [None])
    while True:
        try:
            frames = stream.decode(next(packets))
        except StopIteration:
            break
        except IndexError:  # PyAV at the end of a file in which a new stream turned up
            continue
        except (av.FFmpegError, OSError) as error:
            reason = reason or error.strerror
            continue
        decoded += len(frames)
        yield from frames
    if not decoded:
        raise ClipError(f"no frame decodes: {reason}")


def _resample(frames: Iterator[av.VideoFrame], fps: Fraction) -> Iterator[tuple[av.VideoFrame, int]]:
    """Pairs each frame with how many output frames at `fps` show it, which may be none."""
    shown = 0
    for frame, end in _until(frames):
        count = max(0, math.ceil(end * fps) - shown)
        shown += count
        yield frame, count


def _until(frames: Iterator[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Pairs each frame with when it leaves the screen, in seconds after the first frame appeared."""
    time, gaps, durations_hold = Fraction(0), [], True
    for frame, following in itertools.pairwise(itertools.chain(_in_order(frames), [None])):
        duration = _seconds(frame.duration, frame)
        if following is None:
            # FFmpeg makes up durations where a container has none, so believe this one only if the one before was true.
            gap = duration if durations_hold else None
        else:
            stamped = None not in (frame.pts, following.pts)
            gap = _seconds(following.pts - frame.pts, frame) if stamped else None
            durations_hold = None not in (duration, gap) and abs(duration - gap) <= frame.time_base
        if gap is not None:
            gaps.append(gap)
        else:  # a stamp is missing, jumps or starts anew: the clip goes on at its pace so far
            gap = statistics.median(gaps) if gaps else duration or DEFAULT_GAP_SECONDS
        time += gap
        # Containers round time stamps to a tick (1 ms in Matroska, 10 ms in GIF), so a frame due within a tick is on
        # time: or 30 fps read at 30 fps would repeat one frame and lose the next. A gap of one tick is not rounded.
        rounded = frame.time_base is not None and gap > 2 * frame.time_base
        yield frame, time - frame.time_base if rounded else time


def _in_order(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Drops stragglers: decoders resume after damage with a frame or two out of turn."""
    latest, straggler = None, None
    for frame in frames:
        late = None not in (latest, frame.pts) and frame.pts <= latest
        if late and straggler is None:
            straggler = frame
            continue
        if late:  # two in a row: not a straggler, the stamps start anew
            yield straggler
        straggler, latest = None, frame.pts
        yield frame


def _seconds(ticks: int | None, frame: av.VideoFrame) -> Fraction | None:
    """A time in the frame's ticks in seconds; None where it is unknown or can't be true of neighbouring frames."""
    if not ticks or frame.time_base is None:
        return None
    seconds = ticks * frame.time_base
    return seconds if 0 < seconds <= LONGEST_GAP_SECONDS else None


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    size = frame.height, frame.width
    return size[::-1] if _quarter_turns(frame) % 2 else size


def _covering(height: int, width: int, cover: tuple[int, int] | None) -> tuple[int, int]:
    """The size (height, width) to which a picture is resized so that it just covers `cover`."""
    if cover is None:
        return height, width
    scale = max(cover[0] / height, cover[1] / width)
    return max(cover[0], round(height * scale)), max(cover[1], round(width * scale))


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> np.ndarray:
    """The frame upright and resized to (height, width), uint8 [height, width, 3]."""
    turns = _quarter_turns(frame)
    height, width = size[::-1] if turns % 2 else size
    frame = reformatter.reformat(frame, width, height, "rgb24", interpolation=RESIZE, threads=1)
    return np.rot90(frame.to_ndarray(), turns)
