"""Which frame is on screen when: a file's time stamps, as they are, made into a steady rate."""

import itertools
import math
import statistics
from collections.abc import Iterator
from fractions import Fraction

import av

from walt_jax.data.limits import ClipError

# A longer gap between two time stamps is a broken clock, and believing it would fill memory with one repeated frame;
# unless the header says that the frames are that far apart on average, as in a time-lapse.
LONGEST_GAP_SECONDS = 10
LONGEST_GAP_FRAMES = 1.5  # a single jump among three frames or more is longer than so many average gaps

# What a frame lasts in a file that says nothing about time at all.
DEFAULT_GAP_SECONDS = Fraction(1, 25)


class NeedsAllFrames(Exception):
    """What is asked for depends on frames that were left out."""


def longest_gap(stream: av.VideoStream) -> Fraction:
    """The longest gap, in seconds, that two time stamps of a stream may have."""
    rate = stream.average_rate
    return max(Fraction(LONGEST_GAP_SECONDS), Fraction(LONGEST_GAP_FRAMES) / rate if rate else Fraction(0))


def resample(
    frames: Iterator[av.VideoFrame],
    fps: Fraction,
    seconds: float,
    start: Fraction | None = None,
    longest: Fraction = Fraction(LONGEST_GAP_SECONDS),
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Pairs each frame with how many output frames at `fps` show it, which may be none.

    Args:
      frames: a whole stream, or its end from the frame on that appears at `start`.
      fps: output frames per second.
      seconds: the most that the clock may show.
      start: seconds after the stream's first frame. The first of `frames` is then paired with all output frames up to
        its end, although frames before it show some.
      longest: see `longest_gap`.

    Raises:
      NeedsAllFrames: `start` was given, and the clock depends on frames before it.
      ClipError: the clock shows more than `seconds`.
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
    """The time from one stamp to the next in seconds; None where it is unknown or can't be true of neighbours."""
    if None in (earlier, later, time_base):
        return None
    seconds = (later - earlier) * time_base
    return seconds if 0 < seconds <= longest else None


def _until(
    frames: Iterator[av.VideoFrame], start: Fraction | None, longest: Fraction
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Pairs each frame with when it leaves the screen, in seconds after the first frame appeared."""
    time, gaps = start or Fraction(0), []
    # Of the frame before, which may be one of those left out.
    durations_hold = start is None
    for frame, following in itertools.pairwise(itertools.chain(_in_order(frames), [None])):
        duration = seconds_between(0, frame.duration, frame.time_base, longest)
        if following is None:
            # FFmpeg makes up durations where a container has none, so believe this one only if the one before was true.
            gap = duration if durations_hold else None
        else:
            gap = seconds_between(frame.pts, following.pts, frame.time_base, longest)
            durations_hold = None not in (duration, gap) and abs(duration - gap) <= frame.time_base
        if gap is not None:
            gaps.append(gap)
        elif start is not None:
            raise NeedsAllFrames
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
