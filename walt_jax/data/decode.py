"""Opens files that nobody vouches for and gives their frames packet by packet, within limits."""

import contextlib
import io
import itertools
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

import av
from av.stream import Disposition
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits, Stopwatch

# FFmpeg counts a row's padding as pixels; frames that pass are measured exactly.
ROW_PADDING = 128


@contextlib.contextmanager
def opened(
    path: epath.PathLike | bytes, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container of a file, or of its content, and its first video stream that can be decoded.

    Raises:
      ClipError: the file is no video, or its pictures are too large.
    """
    with _readable(path) as file:
        # FFmpeg decodes a picture to find out what a stream is, so its limit must stand before that.
        options = {"max_pixels": str(limits.pixels + ROW_PADDING * limits.longest_side)}
        try:
            if not file.read(1):
                raise ClipError("empty file")
            file.seek(0)
            # An open file rather than a path: remote files work, and a name with a colon is not taken for a protocol.
            # No protocols: a file that is a list of other files or addresses must not make us read those.
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
            # The cover picture of a sound file is a video stream too.
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
    """The stream's packets up to where the container ends or breaks off; an empty one at the end asks for the rest."""
    with contextlib.suppress(IndexError):  # PyAV at the end of a file in which a new stream turned up
        yield from container.demux(stream)


def decoded(
    packets: Iterator[av.Packet], stream: av.VideoStream, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[av.VideoFrame]:
    """Every frame that can be had of a stream; `container.decode` would stop at the first bad packet.

    Raises:
      ClipError: no frame decodes, or a limit is reached.
    """
    count, empty, found, reason = 0, 0, False, None
    # Where the container breaks off, the decoder still holds frames; None asks for them.
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
        count += bool(packet and packet.size)
        empty = 0 if frames else empty + 1
        if empty > limits.empty_packets:
            raise ClipError(f"{empty} packets in a row without a frame")
        if count > limits.packets:
            raise ClipError(f"more than {limits.packets} packets")
        for frame in frames:
            limits.check_size(frame.width, frame.height)
            found = True
            yield frame
    if not found:
        raise ClipError(f"no frame decodes: {reason}")


def _check_refused(error: Exception, context: av.VideoCodecContext, limits: DecodeLimits) -> None:
    """Raises ClipError where a packet did not decode since its picture is too large."""
    limits.check_size(context.width, context.height)
    # Most decoders forget the size that FFmpeg refused them.
    if isinstance(error, av.ArgumentError) and not context.width:
        raise ClipError(f"too large: a picture may have {limits.pixels} pixels")


class _Watched:
    """A file of which no read starts after the time is up. What it raises comes out of FFmpeg's calls."""

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
            if not stat.S_ISREG(mode):  # opening a pipe waits for a writer, and a device need not end
                raise ClipError("a pipe or a device, not a file")
        return epath.Path(path).open("rb")
    except OSError as error:
        raise ClipError(f"it can't be opened: {_message(error)}") from error
    except ValueError as error:  # a null byte in its name
        raise ClipError(f"it can't be opened: {error}") from error


def _message(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
