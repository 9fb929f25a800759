"""A folder of captioned clips as a random-access source."""

import collections
import csv
import dataclasses
import hashlib
import io
import threading
from collections.abc import Iterable
from concurrent import futures

import numpy as np
import tqdm
from absl import logging
from etils import epath

from walt_jax.data.video import ClipError, read_clip
from walt_jax.errors import UserError

SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".gif", ".mkv", ".ts", ".m4v")

SPLITS = ("train", "held_out")

# The words that data sets use in a metadata.csv's split column.
SPLIT_COLUMN = {"train": "train", "val": "held_out", "validation": "held_out", "test": "held_out"}

HELD_OUT_FRACTION = 1 / 8

# Decoded. A film of two hours must not fill the memory: 26 minutes at 8 fps of 64 x 112 pixels, 97 s of 256 x 448.
LONGEST_CLIP_BYTES = 2**28

# Enough to hide the latency of a network disk; decoding itself is bound by the cores.
CHECK_THREADS = 4


class FolderClips:
    """The clips of one split of a folder, cut to one size.

    Which files: those with a video's suffix, in sub-folders too, without captions; or, where the folder holds a
    `metadata.csv` with the columns `file_name` (relative to the folder) and `caption`, one clip for each of its rows.
    Its column `split` (train, val or test), where there is one, decides what is held out. Otherwise a hash of the file
    name holds out one file in eight, so that a file stays in its split when others come and go.

    A clip is decoded at the size that just covers the crop and kept while the cache has room; of an overlong file, the
    first LONGEST_CLIP_BYTES are used. Copies in other processes start with an empty cache and keep their own account of
    what they skipped.

    Attributes:
      captions: one str a clip, "" where there is none (unconditional).
    """

    def __init__(
        self,
        folder: epath.PathLike,
        split: str,
        frames: int,
        fps: float | None,
        height: int,
        width: int,
        cache_bytes: int = 2**30,
        max_bad_fraction: float = 0.0,
        caption_column: str = "caption",
    ):
        """Lists the folder and checks that each file opens and that its first frame decodes.

        Args:
          folder: local or remote.
          split: "train" or "held_out"; a folder of a single clip has it in both.
          frames: frames of a sample.
          fps: frames per second of a sample; None takes every frame of the file.
          height: of a sample, in pixels.
          width: of a sample, in pixels.
          cache_bytes: of decoded clips, in all.
          max_bad_fraction: the share of unreadable files, in [0, 1], up to which they are skipped.
          caption_column: of the `metadata.csv`.

        Raises:
          UserError: the folder or its metadata.csv is not as described, too many files can't be read, or no clip of the
            split is long enough.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, not one of {SPLITS}")
        self.folder = epath.Path(folder)
        self.split = split
        self.frames, self.fps, self.height, self.width = frames, fps, height, width
        self._longest = max(frames, LONGEST_CLIP_BYTES // (height * width * 3))
        self._cache = _Cache(cache_bytes)
        self._reasons = {}
        self._caption_column = caption_column

        rows = self._list_rows()
        bad = self._check({row.file for row in rows}, max_bad_fraction)
        rows = [row for row in rows if row.file not in bad]
        self._rows = _of_split(rows, split)
        self.captions = [row.caption for row in self._rows]
        if not self._rows:
            raise UserError(
                f"no readable clip in {self.folder} belongs to the {split} split: add clips, or correct the column "
                "split of its metadata.csv."
            )
        # Now rather than after the model has been compiled: raises where no clip is long enough.
        for row in self._rows:
            if self._clip(row.file) is not None:
                break

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """What is left out and why, so far: a list of {`file`, `reason`}."""
        return [{"file": file, "reason": reason} for file, reason in list(self._reasons.items())]

    def sample(self, index: int, rng: np.random.Generator) -> dict | None:
        """A random window of a clip, randomly cropped; the same state of `rng` gives the same bytes.

        Returns:
          {`video`: uint8 [frames, height, width, 3], RGB, `caption`: str}, or None for a clip that proves too short or
          unreadable; it is then listed in `skipped`.

        Raises:
          UserError: this was the last usable clip.
        """
        return self._cut(index, lambda room: rng.integers(room + 1), lambda room: rng.integers(room + 1))

    def center(self, index: int) -> dict | None:
        """The same with the clip's first window and the central crop, for evaluation."""
        return self._cut(index, lambda room: 0, lambda room: room // 2)

    def _cut(self, index, choose_start, choose_corner) -> dict | None:
        row = self._rows[index]
        clip = self._clip(row.file)
        if clip is None:
            return None
        length, height, width, _ = clip.shape
        start = choose_start(length - self.frames)
        top = choose_corner(height - self.height)
        left = choose_corner(width - self.width)
        window = clip[start : start + self.frames, top : top + self.height, left : left + self.width]
        # A copy: a view would let the caller write into the cache.
        return {"video": window.copy(), "caption": row.caption}

    def _clip(self, file: str) -> np.ndarray | None:
        """The decoded clip, uint8 [t, h, w, 3] with t ≥ frames, h ≥ height and w ≥ width; None if it is unusable."""
        if file in self._reasons:
            return None
        clip = self._cache.get(file)
        if clip is not None:
            return clip
        try:
            clip = read_clip(self.folder / file, self.fps, self._longest, cover=(self.height, self.width))
        except ClipError as error:
            return self._skip(file, str(error))
        if len(clip) < self.frames:
            return self._skip(file, f"too short: {len(clip)} of {self._wanted()}")
        if len(clip) == self._longest:
            message = "%s and perhaps others: only the first %d frames are used; cut long files up."
            logging.log_first_n(logging.WARNING, message, 1, self.folder / file, self._longest)
        self._cache.put(file, clip)
        return clip

    def _skip(self, file: str, reason: str) -> None:
        self._reasons[file] = reason
        if all(row.file in self._reasons for row in self._rows):
            raise UserError(
                f"no clip of {self.folder}'s {self.split} split gives {self._wanted()}; {file}, for one, does not "
                f"({reason}): use longer clips, or ask for fewer frames or more frames per second."
            )

    def _wanted(self) -> str:
        return f"{self.frames} frames" + (f" at {self.fps:g} fps" if self.fps else "")

    def _list_rows(self) -> list["_Row"]:
        if not self.folder.is_dir():
            raise UserError(f"there is no data folder {self.folder}: correct its path, or create it.")
        files = sorted(_videos(self.folder))
        table = self.folder / "metadata.csv"
        if not table.exists():
            if not files:
                raise UserError(f"{self.folder} holds no video: put files in it that end in {', '.join(SUFFIXES)}.")
            return [_Row(file, "") for file in files]
        rows = _read_table(table, self._caption_column)
        named = {row.file for row in rows}
        for file in sorted(named.difference(files)):
            if not (self.folder / file).is_file():
                raise UserError(f"{table} names {file}, which is not there: add the file, or remove its row.")
        self._reasons.update((file, "not in metadata.csv") for file in files if file not in named)
        return rows

    def _check(self, files: Iterable[str], max_bad_fraction: float) -> set[str]:
        """The files that can't be read, entered in the account of the skipped ones."""
        files = sorted(files)
        with futures.ThreadPoolExecutor(CHECK_THREADS) as pool:
            reasons = pool.map(lambda file: _trouble(self.folder / file), files)
            progress = tqdm.tqdm(
                reasons, f"checking {self.folder}", len(files), unit="file", delay=3, leave=False, disable=None
            )
            bad = {file: reason for file, reason in zip(files, progress, strict=True) if reason}
        if len(bad) > max_bad_fraction * len(files):
            file, reason = next(iter(bad.items()))
            raise UserError(
                f"{len(bad)} of {len(files)} files in {self.folder} can't be read, the first being {file} ({reason}): "
                f"remove {'it' if len(bad) == 1 else 'them'}, or raise --config.data.max_bad_fraction, now "
                f"{max_bad_fraction:g}."
            )
        self._reasons.update(bad)
        return set(bad)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A clip: its file relative to the folder, its caption, and its split where the table decides."""

    file: str
    caption: str
    split: str | None = None


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


def _videos(folder: epath.Path) -> Iterable[str]:
    """The video files in a folder and its sub-folders, relative to it; hidden ones are systems' own."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        # By the name first: on a remote disk, each `is_dir` is a message.
        if path.suffix.lower() in SUFFIXES:
            yield path.name
        elif path.is_dir():
            yield from (f"{path.name}/{file}" for file in _videos(path))


def _read_table(table: epath.Path, caption_column: str) -> list[_Row]:
    """The rows of a metadata.csv."""
    try:
        # utf-8-sig: spreadsheet programs put a byte-order mark in front.
        lines = list(csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline="")))
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{table} can't be read as CSV ({error}): write it anew.") from error
    if not lines:
        raise UserError(f"{table} names no clip: add a line file_name,caption and a row for each clip, or remove it.")
    for column in ("file_name", caption_column):
        if column not in lines[0]:
            raise UserError(f"{table} has no column {column}: its first line must name file_name and {caption_column}.")
    return [_row(line, table, caption_column) for line in lines]


def _row(line: dict[str, str | None], table: epath.Path, caption_column: str) -> _Row:
    file = (line["file_name"] or "").strip()
    if not file:
        raise UserError(
            f"{table} has a row without a file_name ({line[caption_column]!r}): fill it in, or remove the row."
        )
    split = None
    if "split" in line:
        word = (line["split"] or "").strip().lower()
        if word not in SPLIT_COLUMN:
            raise UserError(f"{table} puts {file} in the split {word!r}: write one of {', '.join(SPLIT_COLUMN)}.")
        split = SPLIT_COLUMN[word]
    return _Row(file.removeprefix("./"), (line[caption_column] or "").strip(), split)


def _trouble(path: epath.Path) -> str | None:
    """Why a file can't be read, or None."""
    try:
        read_clip(path, max_frames=1)
    except ClipError as error:
        return str(error)
    return None


def _of_split(rows: list[_Row], split: str) -> list[_Row]:
    if any(row.split for row in rows):
        return [row for row in rows if row.split == split]
    files = {row.file for row in rows}
    if len(files) == 1:
        return rows
    held_out = _held_out(files)
    return [row for row in rows if (row.file in held_out) == (split == "held_out")]


def _held_out(files: Iterable[str]) -> set[str]:
    """One file in eight by a hash of its name, but at least one, and not all of several."""
    by_hash = sorted((_uniform(file), file) for file in files)
    count = sum(number < HELD_OUT_FRACTION for number, _ in by_hash)
    count = max(1, min(count, len(by_hash) - 1))
    return {file for _, file in by_hash[:count]}


def _uniform(file: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") / 2**64
