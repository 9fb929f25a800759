"""Folders of videos of any origin, as metrics read them: the first frames of each file."""

import collections
import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from etils import epath
from jaxtyping import UInt8

from walt_jax.data.limits import ClipError
from walt_jax.data.listing import walk
from walt_jax.data.suffixes import IMAGE_SUFFIXES, SUFFIXES
from walt_jax.data.video import frame_rate
from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError

Clip = UInt8[np.ndarray, "t h w 3"]
RATE_SECONDS = 60  # time to read a file's header
T = TypeVar("T")


class VideoFolder:
    """The videos of a folder and its sub-folders, with the reasons why some are skipped.

    Attributes:
        path: of the folder.
        names: files with a suffix of a video or picture, relative to the folder, sorted.
        skipped: the reason for each file that can't be measured, as far as they have been read.
        longer: files that have more frames than were read.
    """

    def __init__(self, path: pathlib.Path, flag: str):
        """
        Args:
            path: of the folder.
            flag: what names it on the command line.

        Raises:
            UserError: if it is no folder, or holds no videos.
        """
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise UserError(f"{flag}={path} {what}; name a folder of videos.")
        try:
            listing = walk(epath.Path(path), SUFFIXES)
        except OSError as error:
            raise UserError(f"{flag}={path} can't be read ({error.strerror}); check its permissions.") from error
        if not listing.files:
            others = f"; it holds {len(listing.others)} other files" if listing.others else ""
            raise UserError(f"{flag}={path} holds no videos{others}: name a folder of .mp4, .webm, .gif, … files.")
        self.path, self.flag, self.names = path, flag, listing.files
        self.skipped: dict[str, str] = dict.fromkeys(listing.misnamed, "its name is not UTF-8")
        self.longer: set[str] = set()
        self._digests: dict[str, str] = {}

    @property
    def of_pictures(self) -> bool:
        """Whether no file is a video, by their suffixes."""
        return all(name.lower().endswith(IMAGE_SUFFIXES) for name in self.names)

    @property
    def usable(self) -> list[str]:
        """Names of files that have not been skipped so far."""
        return [name for name in self.names if name not in self.skipped]

    def digest(self, name: str) -> str:
        """SHA-256 of a file; of one that can't be read a skip, and its name instead."""
        if name not in self._digests:
            total = hashlib.sha256()
            try:
                with (self.path / name).open("rb") as file:
                    while part := file.read(2**20):
                        total.update(part)
                self._digests[name] = total.hexdigest()
            except OSError as error:
                self.skipped[name] = error.strerror
                return name
        return self._digests[name]

    def read(self, name: str, frames: int, watchdog: Watchdog) -> Clip | None:
        """The first frames of a file; None, and an entry in `skipped`, if it does not have as many."""
        try:
            clip = watchdog.read_clip(self.path / name, max_frames=frames + 1)
        except (ClipError, OSError) as error:
            self.skipped[name] = str(error)
            return None
        if len(clip) < frames:
            self.skipped[name] = f"it has {len(clip)} frames, and {frames} are measured"
            return None
        if len(clip) > frames:
            self.longer.add(name)
        return clip[:frames]

    def rate(self, name: str, watchdog: Watchdog) -> float:
        """Frames per second, by the file's header or time stamps; 0 of a picture."""
        try:
            return float(watchdog.call(RATE_SECONDS, frame_rate, self.path / name))
        except (ClipError, OSError):
            return 0.0

    def check_any(self, frames: int) -> None:
        """
        Raises:
            UserError: if all files have been skipped.
        """
        if not self.usable:
            name, reason = next(iter(self.skipped.items()))
            remedy = f"videos of at least {frames} frames, or measure fewer with --num_frames"
            raise UserError(
                f"None of the {len(self.names)} files in {self.flag}={self.path} can be measured; {name}, for one: "
                f"{reason}. Give {remedy if frames > 1 else 'pictures that open'}."
            )


def read_ahead(function: Callable[[str], T], names: Iterable[str]) -> Iterator[tuple[str, T]]:
    """(name, function(name)) in order, computed by threads a few names ahead of the caller."""
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[str, concurrent.futures.Future[T]]] = collections.deque()
        try:
            for name in names:
                waiting.append((name, pool.submit(function, name)))
                if len(waiting) > 2 * workers:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
