"""Reads a video file into an array of frames: any format, any frame rate; of a damaged file all frames that decode."""

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter
from etils import epath

from walt_jax.data import hdr
from walt_jax.data.clock import DEFAULT_GAP_SECONDS, NeedsAllFrames, longest_gap, resample, seconds_between
from walt_jax.data.decode import decoded, opened, packets
from walt_jax.data.limits import ClipError, DecodeLimits, Stopwatch
from walt_jax.data.seek import has_key_frames, resample_from

# Frames per second. A header above the highest rate gives clock ticks, not frames; one below the lowest is not trusted.
HIGHEST_RATE = 240
LOWEST_HEADER_RATE = 1
LOWEST_RATE = Fraction(1, 1000)
MEASURED_PACKETS = 1000

# Antialiased: swscale widens the bicubic kernel when it shrinks a picture. The flags are for exactness: without full
# chroma interpolation white becomes 253.
RESIZE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

DEFAULT_LIMITS = DecodeLimits()

EXIF = 31  # FFmpeg's number of this type of side data


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """Header information of a file. Its first frame decodes at this size; later ones are not checked.

    Attributes:
      frames: number of frames, at least 1: of packets if `counted`, else the header's.
      fps: mean frames per second.
      height: in pixels, upright.
      width: in pixels, upright.
      seconds: duration.
      counted: whether packets were counted, since the header has no number of frames.
    """

    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    counted: bool


def read_clip(
    path: epath.PathLike | bytes,
    fps: float | None = None,
    max_frames: int | None = None,
    short_side: int | None = None,
    cover: tuple[int, int] | None = None,
    start: int = 0,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Decodes a video, an animated picture or a still picture, or a window of it.

    Time is measured by time stamps, not by the header's rate: output frame k is the frame that is shown k / fps seconds
    after the first one; the last frame is shown for its own duration. Frames are upright, without alpha. If a packet
    does not decode, only its own frames are lost; the previous frame is shown in their place.

    Args:
      path: a file of any format that FFmpeg reads, local or remote (`etils.epath`), or its bytes.
      fps: output frames per second; None gives every decoded frame once.
      max_frames: maximum number of output frames.
      short_side: short side of the output in pixels; the aspect ratio is kept. None keeps the size.
      cover: (height, width) in pixels instead of `short_side`: the output keeps its aspect ratio and is as small as
        possible, but not smaller than this; `short_side=s` means `cover=(s, s)`.
      start: number of output frames to skip. With `fps`, decoding starts at the key frame before, if the file's stamps
        allow it, and gives the same frames as decoding all. (One exception: if more than LONGEST_GAP_SECONDS before the
        window don't decode, the window follows the stamps instead.)
      limits: see `DecodeLimits`.

    Returns:
      uint8 [t, h, w, 3], RGB, with t ≥ 1. If the size changes within the file, later frames are resized to the first
      one's size.

    Raises:
      ClipError: the file gives no frame, ends before `start`, or exceeds the limits.
    """
    if short_side is not None:
        cover = (short_side, short_side)
    pictures = _pictures(path, fps, cover, start, limits, Stopwatch(limits.wall_seconds))
    shape, pixels = (), bytearray()  # grows in place; stacking a list needs twice the memory
    for picture in itertools.islice(pictures, max_frames):
        shape = picture.shape
        if len(pixels) + picture.nbytes > limits.clip_bytes:
            raise ClipError(f"more than {limits.clip_bytes} bytes at {shape[0]} x {shape[1]} pixels")
        pixels += np.ascontiguousarray(picture).data
    return np.frombuffer(pixels, np.uint8).reshape(-1, *shape)


def read_frames(
    path: epath.PathLike | bytes,
    fps: float | Fraction | None = None,
    cover: tuple[int, int] | None = None,
    start: int = 0,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """`read_clip` as an iterator, with memory for a few frames: uint8 [h, w, 3] each, at least one.

    Raises:
      ClipError: as `read_clip`, at the first frame, or when a limit is exceeded.
    """
    watch = Stopwatch(limits.wall_seconds)
    for picture in _pictures(path, fps, cover, start, limits, watch):
        yield picture
        watch.restart()  # the caller's time does not count


def describe(path: epath.PathLike | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> ClipInfo:
    """Size, length and rate of a file; decodes only the first frame.

    The length is the header's, an estimate; if there is none, all packets are read and counted.

    Raises:
      ClipError: the first frame does not decode, or the file exceeds the limits.
    """
    watch = Stopwatch(limits.wall_seconds)
    with opened(path, limits, watch) as (container, stream):
        reader = packets(container, stream)
        again, ahead = itertools.tee(reader)
        frame = next(decoded(ahead, stream, limits, watch))
        _check_hdr(frame, limits)
        height, width = _orientation(frame).size(frame)
        del ahead  # otherwise `tee` would keep every packet
        frames, seconds = stream.frames, (stream.duration or 0) * (stream.time_base or 0)
        counted = frames < 1 or seconds <= 0
        if counted:
            frames, seconds = _count(again, stream, limits, watch)
        reader.close()
    return ClipInfo(frames, float(frames / seconds), height, width, float(seconds), counted)


def frame_rate(path: epath.PathLike) -> Fraction:
    """Frames per second: the header's if it is plausible, else by the median gap of the time stamps.

    Raises:
      ClipError: the file is no video.
    """
    limits = DEFAULT_LIMITS
    watch = Stopwatch(limits.wall_seconds)
    with opened(path, limits, watch) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if rate and LOWEST_HEADER_RATE <= rate <= HIGHEST_RATE:
            return rate
        reader = packets(container, stream)
        stamps, longest = [], 1 / LOWEST_RATE
        with contextlib.suppress(av.FFmpegError, OSError):  # a truncated file
            for packet in itertools.islice(reader, MEASURED_PACKETS):
                watch.check()
                if packet.size and packet.pts is not None:
                    stamps.append(packet.pts)
        reader.close()
        gaps = [seconds_between(*pair, stream.time_base, longest) for pair in itertools.pairwise(sorted(stamps))]
    gaps = [gap for gap in gaps if gap is not None]
    measured = 1 / statistics.median_low(gaps) if gaps else None
    return measured if measured and measured <= HIGHEST_RATE else 1 / DEFAULT_GAP_SECONDS


def _pictures(
    path: epath.PathLike | bytes,
    fps: float | Fraction | None,
    cover: tuple[int, int] | None,
    start: int,
    limits: DecodeLimits,
    watch: Stopwatch,
) -> Iterator[np.ndarray]:
    """Output frames from `start` on: by seeking if possible, else by decoding everything, with equal results."""
    fps = None if fps is None else Fraction(fps)
    yielded = 0
    for first in (start, 0):
        try:
            for picture in _convert(_shown(path, fps, first, limits, watch), cover, start + yielded, limits):
                yield picture
                yielded += 1
        except NeedsAllFrames:
            continue
        if not yielded:
            raise ClipError(f"it ends before frame {start}")
        return
    yield from itertools.islice(_pictures(path, fps, cover, 0, limits, watch), start + yielded, None)


def _shown(
    path: epath.PathLike, fps: Fraction | None, start: int, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Frames in the order in which they are shown, each with the number of output frames that show it.

    With `start`, frames that aren't needed may be missing, but never the first one.
    """
    with opened(path, limits, watch) as (container, stream):
        if start and fps and has_key_frames(stream):
            yield from resample_from(container, stream, fps, start, limits, watch)
            return
        frames = decoded(packets(container, stream), stream, limits, watch)
        yield from (
            ((frame, 1) for frame in frames)
            if fps is None
            else resample(frames, fps, limits.seconds, longest=longest_gap(stream))
        )


def _convert(
    shown: Iterator[tuple[av.VideoFrame, int]], cover: tuple[int, int] | None, skip: int, limits: DecodeLimits
) -> Iterator[np.ndarray]:
    """The pictures of output frames from number `skip` on; the first frame determines the size.

    Raises:
      NeedsAllFrames: a frame does not convert, and the one that is shown in its place was skipped.
      ClipError: no frame converts, or one has a high dynamic range and the limits refuse that.
    """
    reformatter = VideoReformatter()
    picture, size, skipped, orientation, rotation = None, None, False, None, None
    for frame, count in shown:
        if orientation is None or frame.rotation != rotation:  # cheap to compare; the orientation is not
            orientation, rotation = _orientation(frame), frame.rotation
        size = size or covering(*orientation.size(frame), cover)
        _check_hdr(frame, limits)
        left_out = min(count, skip)
        skip, count = skip - left_out, count - left_out
        if not count:
            skipped = skipped or left_out > 0
            continue
        try:
            picture = _to_rgb(frame, size, orientation, reformatter)
        except av.FFmpegError as error:  # damage found this late is treated as if the frame had not decoded
            if picture is None and skipped:
                raise NeedsAllFrames from error
            if picture is None:
                raise ClipError(f"its frames don't convert to RGB: {error.strerror}") from error
        yield from itertools.repeat(picture, count)


def _count(
    packets: Iterator[av.Packet], stream: av.VideoStream, limits: DecodeLimits, watch: Stopwatch
) -> tuple[int, Fraction]:
    """The number of frames by a stream's packets, at least 1, and their duration in seconds."""
    count, gaps, total, latest, duration = 0, 0, Fraction(0), None, None
    # A truncated file is counted up to its end.
    with contextlib.suppress(av.FFmpegError, OSError):
        for packet in itertools.islice(packets, limits.packets):
            watch.check()
            if not packet.size or packet.is_discard:
                continue
            gap = seconds_between(latest, packet.dts, stream.time_base)
            if gap is not None:
                gaps, total = gaps + 1, total + gap
            count, latest, duration = count + 1, packet.dts, packet.duration
    count = max(count, 1)
    if gaps:  # frames without a valid gap, such as the last one, get the mean
        return count, total * count / gaps
    gap = duration * stream.time_base if duration and stream.time_base else DEFAULT_GAP_SECONDS
    return count, count * gap


class _Orientation(NamedTuple):
    """The operations that make a stored picture upright, in this order: one of EXIF's eight orientations.

    Attributes:
      transposed: swap rows and columns.
      upended: reverse the rows.
      mirrored: reverse the columns.
    """

    transposed: bool
    upended: bool
    mirrored: bool

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """The upright (height, width)."""
        return (frame.width, frame.height) if self.transposed else (frame.height, frame.width)


def _orientation(frame: av.VideoFrame) -> _Orientation:
    """A frame's orientation by its display matrix, which FFmpeg derives from EXIF too."""
    try:
        # On a copy of one pixel: a frame and its side data reference each other until the garbage collector runs.
        small = VideoReformatter().reformat(frame, 1, 1, "gray8", interpolation=Interpolation.POINT, threads=1)
        matrix = _side_data(small).get(SideData.DISPLAYMATRIX)
    except (ValueError, av.FFmpegError):  # side data unknown to PyAV: rotation works, mirroring doesn't
        turns = round(frame.rotation / 90) % 4
        return _Orientation(turns % 2 == 1, turns in (1, 2), turns in (2, 3))
    if matrix is None:
        return _Orientation(False, False, False)
    # Column x, row y is displayed at column ax + cy, row bx + dy.
    a, b, c, d = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return _Orientation(True, b < 0, c < 0)
    return _Orientation(False, d < 0, a < 0)


def _side_data(frame: av.VideoFrame) -> Mapping[SideData, Any]:
    """A frame's side data. Without EXIF if PyAV does not know that type: one unknown type makes all inaccessible.

    Raises:
      ValueError: there is another type that PyAV does not know.
    """
    try:
        return frame.side_data
    except ValueError:
        graph = av.filter.Graph()
        graph.threads = 1  # starting threads takes longer than the work
        ends = graph.add_buffer(None, frame.width, frame.height, frame.format, time_base=frame.time_base or Fraction(1))
        for name, options in (("sidedata", f"mode=delete:type={EXIF}"), ("buffersink", None)):
            following = graph.add(name, options)
            ends.link_to(following)
            ends = following
        graph.configure()
        graph.push(frame)
        return graph.pull().side_data


def covering(height: int, width: int, cover: tuple[int, int] | None) -> tuple[int, int]:
    """The smallest size (height, width) that keeps the aspect ratio and is at least `cover`."""
    if cover is None:
        return height, width
    scale = max(cover[0] / height, cover[1] / width)
    return max(cover[0], round(height * scale)), max(cover[1], round(width * scale))


def _check_hdr(frame: av.VideoFrame, limits: DecodeLimits) -> None:
    """Raises ClipError if a frame has a high dynamic range and the limits refuse that."""
    transfer = hdr.transfer_of(frame)
    if transfer and limits.hdr == "refuse":
        raise ClipError(f"high dynamic range ({transfer}), which limits.hdr refuses")


def _to_rgb(
    frame: av.VideoFrame, size: tuple[int, int], orientation: _Orientation, reformatter: VideoReformatter
) -> np.ndarray:
    """The frame upright and resized to (height, width), uint8 [height, width, 3]."""
    transposed, upended, mirrored = orientation
    height, width = size[::-1] if transposed else size
    transfer = hdr.transfer_of(frame)
    wanted = "rgb24" if transfer is None else "yuv444p16le"
    picture = reformatter.reformat(frame, width, height, wanted, interpolation=RESIZE, threads=1).to_ndarray()
    if transfer is not None:
        picture = hdr.tone_map(hdr.normalised(picture, frame.color_range), transfer)
    picture = picture.transpose(1, 0, 2) if transposed else picture
    return picture[:: -1 if upended else 1, :: -1 if mirrored else 1]
