"""Finds the scenes of a video, measures them, and decides which are dropped."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
from etils import epath

from walt_jax.data.prepare_config import PrepareConfig
from walt_jax.data.store import WATCHDOG
from walt_jax.data.video import DEFAULT_LIMITS, ClipError, frame_rate

SHORT_SIDE = 144  # pixels; frames are measured at this size
SAMPLES_PER_SECOND = 4

# Two cuts closer than this are a flash, not a scene: PySceneDetect's usual 15 frames at 25 a second.
SHORTEST_SHOT_SECONDS = 0.6

# Two samples are equal if less than the fraction STILL_PIXELS of pixels differ by more than STILL_LEVELS of 255:
# compression changes many pixels a little, motion of the smallest object changes a few of them a lot.
STILL_LEVELS = 8
STILL_PIXELS = 1e-3

BLACK_LEVELS = 24  # of 255; compressed black is rarely 0

# A bar ends in a straight edge: next to it, at least this share of the content's line is not black, averaged over time.
EDGE_FRACTION = 0.5
EDGE_LINES = 3  # lines over which compression blurs an edge


@dataclasses.dataclass(frozen=True)
class Scene:
    """A part of a video between two cuts, or a piece of one.

    Attributes:
        start, end: frames [start, end) of the video at the rate at which it was read.
        motion: mean length of the optical flow, in short sides of the picture per second.
        static_fraction: share of time in which nothing changes, in [0, 1].
        border_fraction: share of the picture that is black bars, in [0, 1], see `_border`.
    """

    start: int
    end: int
    motion: float
    static_fraction: float
    border_fraction: float


def frames_of(
    path: epath.PathLike, fps: Fraction | None = None, cover: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """`read_frames` in a separate process. All errors are ClipErrors: one bad file of millions must not end a run."""
    try:
        yield from WATCHDOG.read_frames(path, fps, cover)
    except ClipError:
        raise
    except Exception as error:
        raise ClipError(f"decoding failed: {type(error).__name__}: {error}") from error


def rate_of(path: epath.PathLike) -> Fraction:
    """`frame_rate`, read in a separate process."""
    return WATCHDOG.call(DEFAULT_LIMITS.wall_seconds, frame_rate, path)


def find_scenes(path: epath.PathLike, fps: Fraction, cut_threshold: float | None, max_seconds: float) -> list[Scene]:
    """The scenes of a video in order; together they cover it.

    Args:
        path: of the video.
        fps: frames per second at which it is read.
        cut_threshold: see `PrepareConfig`.
        max_seconds: longer scenes are split into equal pieces.

    Raises:
        ClipError: the file can't be read.
    """
    watched = _Watched(frames_of(path, fps, (SHORT_SIDE, SHORT_SIDE)), max(1, round(fps / SAMPLES_PER_SECOND)))
    cuts = _cuts(watched, fps, cut_threshold)
    ends = [0, *cuts, watched.count]
    return [
        watched.scene(start, end, fps)
        for shot in itertools.pairwise(ends)
        for start, end in itertools.pairwise(_pieces(*shot, int(max_seconds * fps)))
    ]


def objection(scene: Scene, fps: Fraction, config: PrepareConfig) -> tuple[str, str] | None:
    """Why a scene is dropped, (filter, sentence); None if it is kept."""
    seconds = float((scene.end - scene.start) / fps)
    if seconds < config.min_seconds:
        return "length", f"{seconds:.2f} s are fewer than min_seconds={config.min_seconds:g}"
    if scene.border_fraction > config.max_border_fraction:
        return "border", (
            f"{scene.border_fraction:.1%} of the picture is a black border, more than "
            f"max_border_fraction={config.max_border_fraction:g}"
        )
    if scene.static_fraction > config.max_static_fraction:
        return "static", (
            f"nothing changes for {scene.static_fraction:.1%} of its time, more than "
            f"max_static_fraction={config.max_static_fraction:g}"
        )
    if scene.motion < config.min_motion:
        return "motion", f"its motion of {scene.motion:.4f} a second is less than min_motion={config.min_motion:g}"
    if config.max_motion is not None and scene.motion > config.max_motion:
        return "motion", f"its motion of {scene.motion:.4f} a second is more than max_motion={config.max_motion:g}"
    return None


def _cuts(frames: Iterable[np.ndarray], fps: Fraction, threshold: float | None) -> list[int]:
    """The first frame of every shot but the first; consumes `frames`."""
    if threshold is None:
        for _ in frames:
            pass
        return []

    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    shortest = max(1, round(SHORTEST_SHOT_SECONDS * fps))
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=shortest)
    cuts = []
    for index, frame in enumerate(frames):
        cuts += detector.process_frame(FrameTimecode(index, fps), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    return [cut.frame_num for cut in cuts]


def _pieces(start: int, end: int, longest: int) -> list[int]:
    """The boundaries of equal pieces of [start, end) of at most `longest` frames, with `start` and `end`."""
    count = -(-(end - start) // max(1, longest))
    return [start + (end - start) * piece // count for piece in range(count + 1)]


class _Watched:
    """Passes frames through, and measures every `stride`-th.

    Attributes:
        count: number of frames so far.
    """

    def __init__(self, frames: Iterable[np.ndarray], stride: int):
        self._frames, self._stride = frames, stride
        self.count = 0
        self._flows, self._still = [], []  # between consecutive samples
        self._lit = []  # of each sample, the share of each row and of each column that is not black

    def __iter__(self) -> Iterator[np.ndarray]:
        import cv2

        cv2.setNumThreads(1)  # the runner already uses all cores
        before = None
        for frame in self._frames:
            if self.count % self._stride == 0:
                grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
                lit = grey > BLACK_LEVELS
                self._lit.append((lit.mean(1), lit.mean(0)))
                if before is not None:
                    still = np.mean(cv2.absdiff(before, grey) > STILL_LEVELS) < STILL_PIXELS
                    self._still.append(still)
                    self._flows.append(0.0 if still else _flow(before, grey))
                before = grey
            self.count += 1
            yield frame

    def scene(self, start: int, end: int, fps: Fraction) -> Scene:
        """The scene of frames [start, end). One with fewer than two samples counts as static."""
        first, last = -(-start // self._stride), (end - 1) // self._stride
        flows, still = self._flows[first:last], self._still[first:last]
        lit = self._lit[first : last + 1]
        samples_per_second = float(fps / self._stride)
        return Scene(
            start,
            end,
            motion=float(np.mean(flows)) * samples_per_second if flows else 0.0,
            static_fraction=float(np.mean(still)) if still else 1.0,
            border_fraction=_border(*map(np.array, zip(*lit, strict=True))) if lit else 0,
        )


def _flow(before: np.ndarray, after: np.ndarray) -> float:
    """Mean length of Farnebäck's optical flow between two grey pictures, in short sides of the picture."""
    import cv2

    flow = cv2.calcOpticalFlowFarneback(
        before, after, None, pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0
    )
    return float(np.linalg.norm(flow, axis=-1).mean()) / min(before.shape)


def _border(rows: np.ndarray, columns: np.ndarray) -> float:
    """The share of a picture that is black bars.

    A bar is black in every sample, spans the whole width or height, and ends in a straight edge of the content. Black
    background of logos, shapes or simulators has no such edge, or a moving one: it counts as content.

    Args:
        rows, columns: [samples, lines], the share of each line that is not black.
    """
    lit = [np.flatnonzero(lines.max(0) > 0) for lines in (rows, columns)]
    if not len(lit[0]):
        return 1.0
    extents = [(indices[0], indices[-1] + 1) for indices in lit]
    inside = 1.0
    for axis, lines in enumerate((rows, columns)):
        (start, end), (across, across_end) = extents[axis], extents[1 - axis]
        count, length = lines.shape[1], (columns, rows)[axis].shape[1]
        covered = (across_end - across) / length
        edges = {"first": lines[:, start : start + EDGE_LINES], "last": lines[:, max(start, end - EDGE_LINES) : end]}
        straight = {name: edge.max(1).mean() / covered >= EDGE_FRACTION for name, edge in edges.items()}
        bars = start * straight["first"] + (count - end) * straight["last"]
        inside *= 1 - bars / count
    return float(1.0 - inside)
