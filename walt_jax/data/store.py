"""Files that clips are in, whatever is made of them: decoded within limits, short ones kept."""

import abc
import collections
import dataclasses
import threading

import numpy as np
from etils import epath

from walt_jax.data.limits import DecodeLimits
from walt_jax.data.video import ClipInfo
from walt_jax.data.watchdog import Watchdog

# A clip of up to so many bytes, decoded, is decoded whole and kept; of a longer one just the frames that are needed.
WHOLE_CLIP_BYTES = 2**26

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
    """

    path: epath.Path
    rows: list[Row]
    info: dict[str, ClipInfo]

    def __init__(self, cache_bytes: int, limits: DecodeLimits):
        """Args:
        cache_bytes: of decoded clips, in all.
        limits: what a file may ask for.
        """
        self.limits = limits
        self.reasons: dict[str, str] = {}
        self._cache = _Cache(cache_bytes)

    @abc.abstractmethod
    def content(self, file: str) -> epath.PathLike | bytes:
        """What `video.read_clip` reads of a file."""

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
        """All frames of a file, or None where these are too many and more than `span`.

        Raises:
            ClipError: the file gives none.
        """
        key = (file, cover, fps)
        clip = self._cache.get(key)
        if clip is not None:
            return clip
        info = self.info[file]
        scale = max(cover[0] / info.height, cover[1] / info.width)
        frame_bytes = 3 * round(max(cover[0], info.height * scale) * max(cover[1], info.width * scale))
        most = max(span, WHOLE_CLIP_BYTES // frame_bytes)
        if self.length(file, fps) > most:
            return None
        clip = self.read(file, cover, fps, 0, most)
        self._cache.put(key, clip)
        return clip

    def length(self, file: str, fps: float | None) -> int:
        """How many frames a file has at a rate, as its header says."""
        info = self.info[file]
        return max(1, round(info.seconds * fps)) if fps else info.frames


class _Cache:
    """The most recently used arrays, up to a number of bytes in all. Threads may share it."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._arrays = collections.OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __reduce__(self):
        # What is pickled to another process: neither a lock nor a gigabyte of frames.
        return _Cache, (self._limit_bytes,)

    def get(self, key: str) -> np.ndarray | None:
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
            return self._arrays.get(key)

    def put(self, key: str, array: np.ndarray) -> None:
        with self._lock:
            # Another thread may have been quicker; and one array never drives out all the others in vain.
            if key in self._arrays or array.nbytes > self._limit_bytes:
                return
            self._arrays[key] = array
            self.bytes += array.nbytes
            while self.bytes > self._limit_bytes:
                self.bytes -= self._arrays.popitem(last=False)[1].nbytes
