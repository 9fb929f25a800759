"""Reads frames from the middle of a file by seeking to a key frame, if that gives the same frames as decoding all."""

import array
import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from walt_jax.data.clock import LONGEST_GAP_SECONDS, NeedsAllFrames, resample
from walt_jax.data.decode import decoded, packets
from walt_jax.data.limits import ClipError, DecodeLimits, Stopwatch

# Codecs with reliable key frames. In others (GIF, WebP, APNG, screen codecs) pictures are drawn over the previous one.
CODECS = frozenset(
    ["h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "prores", "theora"]
)


def has_key_frames(stream: av.VideoStream) -> bool:
    """Whether, by the header, there may be a second key frame."""
    entries = stream.index_entries
    complete = stream.frames and len(entries) >= stream.frames
    second = itertools.islice((entry for entry in entries if entry.is_keyframe), 1, None)
    return stream.codec_context.name in CODECS and (not complete or next(second, None) is not None)


def resample_from(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    fps: Fraction,
    start: int,
    limits: DecodeLimits,
    watch: Stopwatch,
) -> Iterator[tuple[av.VideoFrame, int]]:
    """`clock.resample` from the last key frame before output frame `start`.

    Packets up to the key frame are read, which costs a hundredth of decoding them, to check their time stamps. From the
    key frame on, the decoded frames must match the packets' time stamps.

    Yields:
      The file's first frame with 0; then the frames from the key frame on, the first of which is paired with all output
      frames up to its end.

    Raises:
      NeedsAllFrames: there is no such key frame, stamps are irregular, a packet does not decode, or seeking leads
        elsewhere. It may be raised late; frames yielded before are right.
    """
    depth = stream.codec_context.reorder_depth
    try:
        first, key = _first_and_key(container, stream, start / fps, limits, watch)
        yield first, 0
        container.seek(key.dts, stream=stream)
        stream.codec_context.reorder_depth = depth  # seeking resets it
        frames = _announced(_from(packets(container, stream), key), stream, key, limits, watch)
        yield from resample(frames, fps, limits.seconds, start=(key.pts - first.pts) * stream.time_base)
    except (av.FFmpegError, OSError, ClipError) as error:  # decoding from the start either copes or names it
        raise NeedsAllFrames from error


@dataclasses.dataclass(frozen=True)
class _Key:
    """The stamps of a key frame's packet, in the stream's ticks."""

    pts: int
    dts: int


def _first_and_key(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    seconds: Fraction,
    limits: DecodeLimits,
    watch: Stopwatch,
) -> tuple[av.VideoFrame, _Key]:
    """The first frame, and the last other key frame that appears at most `seconds` after it."""
    reader = packets(container, stream)
    try:
        again, ahead = itertools.tee(reader)
        first = next(decoded(ahead, stream, limits, watch))
        del ahead  # otherwise `tee` would keep every packet
        if first.pts is None or first.time_base != stream.time_base:
            raise NeedsAllFrames
        latest = first.pts + int(seconds / stream.time_base)
        key, stamps = None, array.array("q")
        for packet in itertools.islice(again, limits.packets):
            watch.check()
            if not packet.size:
                continue
            if None in (packet.pts, packet.dts) or packet.is_corrupt:
                raise NeedsAllFrames
            if packet.dts > latest:
                break
            if packet.is_discard or packet.pts > latest:
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts > max(first.pts, key.pts if key else first.pts):
                key = _Key(packet.pts, packet.dts)
    finally:
        reader.close()
    if key is None:
        raise NeedsAllFrames
    stamps = np.sort(stamps)
    gaps = np.diff(stamps[stamps <= key.pts])
    if stamps[0] != first.pts or gaps.min() <= 0 or gaps.max() > LONGEST_GAP_SECONDS / stream.time_base:
        raise NeedsAllFrames
    return first, key


def _from(packets: Iterator[av.Packet], key: _Key) -> Iterator[av.Packet]:
    """The packets from a key frame's on, after a seek to it or to a point before it."""
    for packet in packets:
        if packet.size and (packet.pts, packet.dts) == (key.pts, key.dts) and packet.is_keyframe:
            yield packet
            yield from packets
            return
        if packet.dts is not None and packet.dts >= key.dts:
            break
    raise NeedsAllFrames


def _announced(
    packets: Iterator[av.Packet], stream: av.VideoStream, key: _Key, limits: DecodeLimits, watch: Stopwatch
) -> Iterator[av.VideoFrame]:
    """The frames from the key frame on, checked to be one for each packet, in the order of their stamps."""
    due = []

    def announce() -> Iterator[av.Packet]:
        for packet in packets:
            if packet.size:
                if packet.pts is None or packet.is_corrupt:
                    raise NeedsAllFrames
                if packet.pts >= key.pts and not packet.is_discard:
                    heapq.heappush(due, packet.pts)
            yield packet

    for frame in decoded(announce(), stream, limits, watch):
        if frame.pts is not None and frame.pts < key.pts:
            continue  # shown before the key frame but stored after it: it depends on skipped frames
        if not due or frame.pts != heapq.heappop(due) or (frame.pts == key.pts and not frame.key_frame):
            raise NeedsAllFrames
        yield frame
    if due:
        raise NeedsAllFrames
