"""Resamples a video to a constant frame rate by its time stamps."""

import itertools
import math
import statistics
from collections.abc import Iterator
from fractions import Fraction

import av

from walt_jax.data.limits import ClipError

# A longer gap between two time stamps is taken for an error: otherwise one repeated frame could fill the memory. An
# exception are files whose average gap is that long by their header, such as time-lapses.
LONGEST_GAP_SECONDS = 10
LONGEST_GAP_FRAMES = 1.5  # in average gaps; a single wrong jump among three or more frames is longer

# Duration of a frame in files without any timing.
DEFAULT_GAP_SECONDS = Fraction(1, 25)


class NeedsAllFrames(Exception):
    """The result depends on frames that were skipped; decode from the start instead."""


def longest_gap(stream: av.VideoStream) -> Fraction:
    """The longest valid gap between two time stamps of a stream, in seconds."""
    rate = stream.average_rate
    return max(Fraction(LONGEST_GAP_SECONDS), Fraction(LONGEST_GAP_FRAMES) / rate if rate else Fraction(0))


def resample(
    frames: Iterator[av.VideoFrame],
    fps: Fraction,
    seconds: float,
    start: Fraction | None = None,
    longest: Fraction = Fraction(LONGEST_GAP_SECONDS),
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Pairs each frame with the number of output frames that show it, which may be 0.

    Args:
      frames: a whole stream, or its frames from time `start` on.
      fps: output frames per second.
      seconds: maximum time.
      start: time of the first of `frames`, in seconds after the stream's first frame. That frame is paired with all
        output frames up to its end, including those that belong to frames before it.
      longest: see `longest_gap`.

    Raises:
      NeedsAllFrames: with `start`, if times depend on frames before it.
      ClipError: a frame ends after `seconds`.
    """
    shown = 0
    for frame, end in _until(frames, start, longest):
        if end > seconds:
            raise ClipError(f"longer than {seconds:g} s")
        count = max(0, math.ceil(end * fps) - shown)
        shown += count
        yield frame, count


def seconds_between(
    earlier: int | None,
    later: int | None,
    time_base: Fraction | None,
    longest: Fraction = Fraction(LONGEST_GAP_SECONDS),
) -> Fraction | None:
    """The time between two consecutive stamps in seconds; None if it is unknown or invalid."""
    if None in (earlier, later, time_base):
        return None
    seconds = (later - earlier) * time_base
    return seconds if 0 < seconds <= longest else None


def _until(
    frames: Iterator[av.VideoFrame], start: Fraction | None, longest: Fraction
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Pairs each frame with its end, in seconds after the start of the first frame."""
    time, gaps = start or Fraction(0), []
    # Whether the previous frame's duration was right; unknown if that frame was skipped.
    durations_hold = start is None
    for frame, following in itertools.pairwise(itertools.chain(_in_order(frames), [None])):
        duration = seconds_between(0, frame.duration, frame.time_base, longest)
        if following is None:
            # FFmpeg invents durations if a container has none: trust the last one only if the previous one was right.
            gap = duration if durations_hold else None
        else:
            gap = seconds_between(frame.pts, following.pts, frame.time_base, longest)
            durations_hold = None not in (duration, gap) and abs(duration - gap) <= frame.time_base
        if gap is not None:
            gaps.append(gap)
        elif start is not None:
            raise NeedsAllFrames
        else:  # a stamp is missing, jumps or restarts: use the median gap so far
            gap = statistics.median(gaps) if gaps else duration or DEFAULT_GAP_SECONDS
        time += gap
        # Containers round time stamps to ticks (1 ms in Matroska, 10 ms in GIF), so a frame may be up to a tick late.
        # Without this tolerance, 30 fps read at 30 fps repeats some frames and drops others. One-tick gaps are exact.
        rounded = frame.time_base is not None and gap > 2 * frame.time_base
        yield frame, time - frame.time_base if rounded else time


def _in_order(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Drops single frames out of order, which decoders emit after damage."""
    latest, straggler = None, None
    for frame in frames:
        late = None not in (latest, frame.pts) and frame.pts <= latest
        if late and straggler is None:
            straggler = frame
            continue
        if late:  # two in a row: the stamps restart
            yield straggler
        straggler, latest = None, frame.pts
        yield frame
