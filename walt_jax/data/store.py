"""Files that clips are in, whatever is made of them: decoded within limits, short ones kept."""

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

# A clip of up to so many bytes, decoded, is decoded whole and kept while there is room; of others just the frames that
# are needed.
WHOLE_CLIP_BYTES = 2**26

# Enough to hide the latency of a network disk; decoding itself is bound by the cores.
CHECK_THREADS = 4

T = TypeVar("T")

# What hangs or crashes is cut off. One for all stores: its processes are shared.
WATCHDOG = Watchdog()


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip of a store.

    Attributes:
        file: its name there.
        captions: each with how often it is taken, over the sum; none is empty.
        split: where the store decides.
        group: what it was cut from, with others that are to be in the same split.
    """

    file: str
    captions: tuple[tuple[str, float], ...] = ()
    split: str | None = None
    group: str = ""


class Store(abc.ABC):
    """Files that clips are in.

    Short clips are kept decoded while the cache has room. Copies in other processes start with an empty one, and keep
    their own account of what they skipped.

    Attributes:
        path: where it is.
        rows: its clips whose files can be read.
        info: what each file's header says.
        reasons: why files are left out, so far.
        problems: sentences, for each of which training stops.
        warnings: sentences, with which training goes on.
        checked: how many files were opened.
        unreadable: how many of them can't be read.
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
        """Lists what is there and checks that each file opens and that its first frame decodes.

        Args:
            path: local or remote.
            captions: columns or features that hold captions, and how often each is taken where it isn't empty.
            cache_bytes: of decoded clips, in all.
            max_bad_fraction: the share of unreadable files, in [0, 1], up to which they are skipped.
            limits: what a file may ask for.
            refuse: whether a problem is an error; if not, `problems` lists it.

        Raises:
            UserError: what is there is not as described, or too much of it can't be read.
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
        """Sets `rows` and `info`, and gives the reasons for what is left out."""

    @abc.abstractmethod
    def content(self, file: str) -> epath.PathLike | bytes:
        """What `video.read_clip` reads of a file."""

    @abc.abstractmethod
    def is_gone(self, file: str) -> bool:
        """Whether a file that was checked is not there any more."""

    def lose(self, file: str) -> None:
        """Enters a file in `gone`.

        Raises:
            UserError: with it, more files are gone or unreadable than `max_bad_fraction` allows.
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
        """What a file holds, or why it can't be read."""
        try:
            return WATCHDOG.call(self.limits.wall_seconds, describe, content, self.limits)
        except ClipError as error:
            return str(error)

    def keep(self, found: Mapping[str, ClipInfo | str], max_bad_fraction: float, unit: str, remedy: str) -> None:
        """Sets `info` to the files that can be used, and enters the others in `reasons`, `unreadable` and `problems`.

        Args:
            found: what each file holds, or why it can't be read.
            max_bad_fraction: see `__init__`.
            unit: what the files are called, plural.
            remedy: what to do about unreadable ones.
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
        """What a function says of each file, in the files' order. It is called in several threads."""
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
        """What is left out and why, so far: a list of {`file`, `reason`}."""
        return [{"file": file, "reason": reason} for file, reason in list(self.reasons.items())]

    def read(self, file: str, cover: tuple[int, int], fps: float | None, start: int, count: int) -> np.ndarray:
        """Frames of a file, uint8 [t, h, w, 3], t ≤ count, covering (height, width).

        Raises:
            ClipError: the file does not give them.
        """
        return WATCHDOG.read_clip(self.content(file), fps, count, cover=cover, start=start, limits=self.limits)

    def whole(self, file: str, cover: tuple[int, int], fps: float | None, span: int) -> np.ndarray | None:
        """All frames of a file that its header promises, at least `span` if it has them; None where that is too much.

        Raises:
            ClipError: the file gives none.
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
        """How many frames a file has at a rate, as its header says."""
        info = self.info[file]
        return max(1, round(info.seconds * fps)) if fps else info.frames


def _raise(now: float, bad: int, of: int) -> str:
    """The remedy that lets so many bad files through."""
    return f"raise --config.data.max_bad_fraction, now {now:g}, to {math.ceil(1000 * bad / of) / 1000:g}"


class _Cache:
    """Arrays up to a number of bytes in all; what comes later is not kept. Threads may share it.

    None makes place for another: where all clips don't fit, an epoch would come back to each one when it has just gone.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._arrays: dict[Any, np.ndarray] = {}
        self._lock = threading.Lock()
        self.bytes = 0

    def __reduce__(self):
        # What is pickled to another process: neither a lock nor a gigabyte of frames.
        return _Cache, (self._limit_bytes,)

    def has_room(self, size: int) -> bool:
        return self.bytes + size <= self._limit_bytes

    def get(self, key: Any) -> np.ndarray | None:
        return self._arrays.get(key)

    def put(self, key: Any, array: np.ndarray) -> None:
        with self._lock:
            if key not in self._arrays and self.has_room(array.nbytes):  # another thread may have been quicker
                self._arrays[key] = array
                self.bytes += array.nbytes
