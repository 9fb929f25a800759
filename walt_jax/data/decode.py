"""Opens untrusted files and decodes them packet by packet, within limits."""

import contextlib
import io
import itertools
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits, Stopwatch

# A frame after damage is garbage if more than this fraction of its pixels has one colour, within this many levels of
# 255. Decoders replace lost content by grey, green, or whatever was in their memory.
GARBAGE_FRACTION, GARBAGE_LEVELS = 0.4, 10
GARBAGE_SIDE = 64  # pixels; frames are shrunk to this for the check

# FFmpeg's limit counts the padding of rows as pixels; sizes are checked exactly later.
ROW_PADDING = 128


@contextlib.contextmanager
def opened(
    path: epath.PathLike | bytes, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file, or its bytes: the container, and its first video stream that can be decoded.

    Raises:
      ClipError: the file is no video, or its pictures are too large.
    """
    with _readable(path) as file:
        # FFmpeg decodes a picture while it probes a stream, so its limit must be set before.
        options = {"max_pixels": str(limits.pixels + ROW_PADDING * limits.longest_side)}
        try:
            if not file.read(1):
                raise ClipError("empty file")
            file.seek(0)
            # An open file rather than a path: supports remote files, and names with a colon are no protocols. The empty
            # whitelist keeps playlists from opening other files or addresses.
            container = av.open(
                _Watched(file, watch),
                options=options,
                container_options={"protocol_whitelist": "none"},
                metadata_errors="ignore",
                timeout=(watch.seconds, None),
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ClipError(f"not a video: {_message(error)}") from error
        with container:
            # Cover pictures of sound files are video streams too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ClipError("no video stream")
            streams = [stream for stream in streams if stream.codec_context is not None]
            if not streams:
                raise ClipError("no decoder for its video stream")
            context = streams[0].codec_context
            limits.check_size(context.width, context.height)
            context.options = options
            yield container, streams[0]


def packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets; the last one is empty and flushes the decoder, unless the file is truncated."""
    with contextlib.suppress(IndexError):  # PyAV's at the end of a file if a new stream appeared
        yield from container.demux(stream)


def decoded(
    packets: Iterator[av.Packet], stream: av.VideoStream, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[av.VideoFrame]:
    """Every frame of a stream that decodes; `container.decode` stops at the first bad packet.

    Garbage is left out: frames between reported damage and the next undamaged key frame that are mostly of one colour,
    unless the last undamaged frame was too.

    Raises:
      ClipError: no frame decodes, or a limit is reached.
    """
    count, empty, found, reason = 0, 0, False, None
    damaged, good, good_is_flat = False, None, None
    # None flushes the decoder, which still holds frames if the container is truncated.
    packets = itertools.chain(packets, [None])
    while True:
        watch.check()
        packet, frames = None, []
        try:
            packet = next(packets)
            frames = stream.decode(packet)
        except StopIteration:
            break
        except (av.FFmpegError, OSError) as error:
            _check_refused(error, stream.codec_context, limits)
            reason = reason or _message(error)
            damaged = True
        count += bool(packet and packet.size)
        empty = 0 if frames else empty + 1
        if empty > limits.empty_packets:
            raise ClipError(f"{empty} packets in a row without a frame")
        if count > limits.packets:
            raise ClipError(f"more than {limits.packets} packets")
        for frame in frames:
            limits.check_size(frame.width, frame.height)
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged:
                if good_is_flat is None:
                    good_is_flat = good is not None and _is_flat(good)
                if not good_is_flat and _is_flat(frame):
                    reason = "its frames are damaged, and mostly of one colour"
                    continue
            else:
                good, good_is_flat = frame, None
            found = True
            yield frame
    if not found:
        raise ClipError(f"no frame decodes: {reason}")


def _is_flat(frame: av.VideoFrame) -> bool:
    """Whether a picture is mostly of one colour."""
    small = VideoReformatter().reformat(
        frame, GARBAGE_SIDE, GARBAGE_SIDE, "rgb24", interpolation=Interpolation.POINT, threads=1
    )
    pixels = small.to_ndarray().reshape(-1, 3).astype(int)
    return (np.abs(pixels - np.median(pixels, 0)).max(-1) <= GARBAGE_LEVELS).mean() > GARBAGE_FRACTION


def _check_refused(error: Exception, context: av.VideoCodecContext, limits: DecodeLimits) -> None:
    """Raises ClipError if a packet did not decode because its picture is too large."""
    limits.check_size(context.width, context.height)
    # Most decoders reset the size that FFmpeg refused.
    if isinstance(error, av.ArgumentError) and not context.width:
        raise ClipError(f"too large: a picture may have {limits.pixels} pixels")


class _Watched:
    """A file whose reads raise ClipError after the timeout; FFmpeg's calls pass it on."""

    def __init__(self, file: BinaryIO, watch: Stopwatch):
        self._file, self._watch = file, watch
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._watch.check()
        return self._file.read(size)


def _readable(path: epath.PathLike | bytes) -> BinaryIO:
    if isinstance(path, bytes):
        return io.BytesIO(path)
    try:
        if "://" not in os.fspath(path):
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise ClipError("a folder, not a file")
            if not stat.S_ISREG(mode):  # opening a pipe blocks, and a device may be endless
                raise ClipError("a pipe or a device, not a file")
        return epath.Path(path).open("rb")
    except OSError as error:
        raise ClipError(f"it can't be opened: {_message(error)}") from error
    except ValueError as error:  # a null byte in its name
        raise ClipError(f"it can't be opened: {error}") from error


def _message(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
