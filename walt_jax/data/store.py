"""Stores of encoded clips: files that are checked once, decoded within limits, and cached if they are small."""

import abc
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import numpy as np
import tqdm
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.video import DEFAULT_LIMITS, ClipInfo, covering, describe
from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError

# Clips up to this decoded size are decoded whole and cached while there is room; of larger ones only the needed window
# is decoded.
WHOLE_CLIP_BYTES = 2**26

CHECK_THREADS = 4  # hides the latency of a network disk

T = TypeVar("T")

# One for all stores, so that they share its workers.
WATCHDOG = Watchdog()


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip of a store.

    Attributes:
        file: its name in the store.
        captions: (text, weight) each; weights are not normalised, no text is empty.
        split: "train" or "held_out", if the store defines splits.
        group: the video that it was cut from; all clips of a group belong to the same split.
    """

    file: str
    captions: tuple[tuple[str, float], ...] = ()
    split: str | None = None
    group: str = ""


class Store(abc.ABC):
    """Files of encoded clips.

    Small clips are cached decoded. Copies in other processes start with an empty cache and track skipped files
    separately.

    Attributes:
        path: of the folder.
        rows: the clips whose files can be read.
        info: header information of each usable file.
        reasons: why files are skipped, so far.
        problems: sentences; training stops on any.
        warnings: sentences that are printed; training goes on.
        checked: number of files that were opened.
        unreadable: how many of these can't be read.
        gone: files that have vanished since they were checked, as keys.
    """

    rows: list[Row]
    info: dict[str, ClipInfo]

    def __init__(
        self,
        path: epath.PathLike,
        captions: Mapping[str, float] | None = None,
        cache_bytes: int = 2**30,
        max_bad_fraction: float = 0.0,
        limits: DecodeLimits = DEFAULT_LIMITS,
        refuse: bool = True,
    ):
        """Lists the files, and checks that each opens and that its first frame decodes.

        Args:
            path: of the folder, local or remote.
            captions: columns or features that hold captions, with weights.
            cache_bytes: maximum size of the cache of decoded clips.
            max_bad_fraction: maximum share of files, in [0, 1], that may be unreadable or vanish.
            limits: see `DecodeLimits`.
            refuse: whether a problem raises an error; if not, `problems` lists it.

        Raises:
            UserError: the folder's content has another format, or too many files can't be read.
        """
        self.path = epath.Path(path)
        self.limits = limits
        self.reasons: dict[str, str] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.checked = self.unreadable = 0
        self.gone: dict[str, None] = {}  # threads enter files
        self._max_bad_fraction, self._refuse = max_bad_fraction, refuse
        self._cache = _Cache(cache_bytes)
        self._open(captions or {"caption": 1.0}, max_bad_fraction)
        if refuse and self.problems:
            raise UserError(self.problems[0])

    @abc.abstractmethod
    def _open(self, captions: Mapping[str, float], max_bad_fraction: float) -> None:
        """Sets `rows` and `info`, and enters skipped files in `reasons`."""

    @abc.abstractmethod
    def content(self, file: str) -> epath.PathLike | bytes:
        """A file's path or bytes, for `video.read_clip`."""

    @abc.abstractmethod
    def is_gone(self, file: str) -> bool:
        """Whether a file that was checked is not there any more."""

    def lose(self, file: str) -> None:
        """Enters a vanished file in `gone`.

        Raises:
            UserError: more files have vanished or are unreadable than `max_bad_fraction` allows.
        """
        self.gone[file] = None
        bad = self.unreadable + len(self.gone)
        if bad > self._max_bad_fraction * self.checked:
            problem = (
                f"{len(self.gone)} of {self.checked} files in {self.path} have vanished since they were checked, the "
                f"last being {file}: restore them and start the same command again, or "
                f"{_raise(self._max_bad_fraction, bad, self.checked)}."
            )
            if self._refuse:
                raise UserError(problem)
            self.problems.append(problem)

    def look(self, content: epath.PathLike | bytes) -> ClipInfo | str:
        """Header information of a file, or the reason why it can't be read."""
        try:
            return WATCHDOG.call(self.limits.wall_seconds, describe, content, self.limits)
        except ClipError as error:
            return str(error)

    def keep(self, found: Mapping[str, ClipInfo | str], max_bad_fraction: float, unit: str, remedy: str) -> None:
        """Sets `info` to the usable files, and enters the others in `reasons`, `unreadable` and `problems`.

        Args:
            found: of each file, the result of `look`.
            max_bad_fraction: see `__init__`.
            unit: what to call the files in messages, plural.
            remedy: what to do about unreadable files.
        """
        bad = {file: info for file, info in found.items() if isinstance(info, str)}
        self.reasons.update(bad)
        self.checked, self.unreadable = len(found), len(bad)
        if len(bad) > max_bad_fraction * len(found):
            file, reason = next(iter(bad.items()))
            self.problems.append(
                f"{len(bad)} of {len(found)} {unit} in {self.path} can't be read, the first being {file} ({reason}): "
                f"{remedy}, or {_raise(max_bad_fraction, len(bad), len(found))}."
            )
        self.info, least = {}, self.limits.shortest_side
        for file, info in found.items():
            if isinstance(info, str):
                continue
            if min(info.height, info.width) < least:
                self.reasons[file] = (
                    f"too small: {info.width} x {info.height} pixels, where a side must have {least} "
                    "(data.limits.shortest_side)"
                )
            else:
                self.info[file] = info

    def check_all(self, check: Callable[[str], T], files: Sequence[str], unit: str) -> dict[str, T]:
        """Calls a function on each file in several threads; the results have the files' order."""
        with futures.ThreadPoolExecutor(CHECK_THREADS) as pool:
            said = tqdm.tqdm(
                pool.map(check, files),
                f"checking {self.path}",
                len(files),
                unit=unit,
                delay=3,
                leave=False,
                disable=None,
            )
            return dict(zip(files, said, strict=True))

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The files skipped so far: a list of {`file`, `reason`}."""
        return [{"file": file, "reason": reason} for file, reason in list(self.reasons.items())]

    def read(self, file: str, cover: tuple[int, int], fps: float | None, start: int, count: int) -> np.ndarray:
        """Decodes a window of a file.

        Args:
            file: its name in the store.
            cover: minimum (height, width) in pixels, see `video.read_clip`.
            fps: frames per second; None takes every frame.
            start: first frame.
            count: maximum number of frames.

        Returns:
            uint8 [t, h, w, 3], t ≤ count.

        Raises:
            ClipError: the file can't be read, or ends before `start`.
        """
        return WATCHDOG.read_clip(self.content(file), fps, count, cover=cover, start=start, limits=self.limits)

    def whole(self, file: str, cover: tuple[int, int], fps: float | None, span: int) -> np.ndarray | None:
        """A whole decoded clip, from the cache if it is there; None if it is too large for the cache.

        Args:
            file, cover, fps: see `read`.
            span: minimum number of frames to try to read, even if the header says that there are fewer.

        Raises:
            ClipError: the file can't be read.
        """
        key = (file, cover, fps)
        clip = self._cache.get(key)
        if clip is None:
            info, count = self.info[file], max(span, self.length(file, fps))
            size = count * 3 * math.prod(covering(info.height, info.width, cover))
            if size > WHOLE_CLIP_BYTES or not self._cache.has_room(size):
                return None
            clip = self.read(file, cover, fps, 0, count)
            self._cache.put(key, clip)
        return clip

    def length(self, file: str, fps: float | None) -> int:
        """The number of frames of a file at a frame rate, by its header."""
        info = self.info[file]
        return max(1, round(info.seconds * fps)) if fps else info.frames


def _raise(now: float, bad: int, of: int) -> str:
    """The remedy that allows this number of bad files."""
    return f"raise --config.data.max_bad_fraction, now {now:g}, to {math.ceil(1000 * bad / of) / 1000:g}"


class _Cache:
    """Arrays up to a total size. Thread-safe.

    Nothing is evicted: if not all clips fit, each would be evicted just before the next epoch needs it.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._arrays: dict[Any, np.ndarray] = {}
        self._lock = threading.Lock()
        self.bytes = 0

    def __reduce__(self):
        # Pickled to another process it is empty: no lock, no gigabyte of frames.
        return _Cache, (self._limit_bytes,)

    def has_room(self, size: int) -> bool:
        return self.bytes + size <= self._limit_bytes

    def get(self, key: Any) -> np.ndarray | None:
        return self._arrays.get(key)

    def put(self, key: Any, array: np.ndarray) -> None:
        with self._lock:
            if key not in self._arrays and self.has_room(array.nbytes):  # another thread may have added it
                self._arrays[key] = array
                self.bytes += array.nbytes
