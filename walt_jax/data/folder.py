"""A folder of captioned clips and images as a random-access source."""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm
from etils import epath

from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.shapes import ClipShape, drawn_order
from walt_jax.data.video import DEFAULT_LIMITS, ClipInfo, describe
from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".gif", ".mkv", ".ts", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

TABLES = ("metadata.csv", "metadata.jsonl")

SPLITS = ("train", "held_out")

# The words that data sets use in a metadata file's split column.
SPLIT_COLUMN = {"train": "train", "val": "held_out", "validation": "held_out", "test": "held_out"}

HELD_OUT_FRACTION = 1 / 8

# A clip of up to so many bytes, decoded, is decoded whole and kept; of a longer one just the frames that are needed.
WHOLE_CLIP_BYTES = 2**26

# Enough to hide the latency of a network disk; decoding itself is bound by the cores.
CHECK_THREADS = 4

# What hangs or crashes is cut off. One for all sources: its processes are shared.
WATCHDOG = Watchdog()


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip of a folder.

    Attributes:
        file: relative to the folder.
        captions: one of each kind, "" where there is none.
        split: where the table decides.
    """

    file: str
    captions: tuple[str, ...]
    split: str | None = None


class Folder:
    """The clips of a folder, whatever is made of them.

    Which files: those with a video's or a picture's suffix, in sub-folders too, without captions; or, where the folder
    holds a `metadata.csv` or a `metadata.jsonl` with `file_name` (relative to the folder) and `caption`, one clip for
    each of its rows. A sub-folder may hold such a table of its own.

    Short clips are kept decoded while the cache has room. Copies in other processes start with an empty one, and keep
    their own account of what they skipped.

    Attributes:
        rows: those whose files can be read.
        info: what each file's header says.
        caption_weights: how often each kind of caption is taken.
        reasons: why files are left out, so far.
    """

    def __init__(
        self,
        path: epath.PathLike,
        captions: Mapping[str, float] | None = None,
        cache_bytes: int = 2**30,
        max_bad_fraction: float = 0.0,
        limits: DecodeLimits = DEFAULT_LIMITS,
    ):
        """Lists the folder and checks that each file opens and that its first frame decodes.

        Args:
            path: local or remote.
            captions: columns of the table that hold captions, and how often each is taken where it isn't empty.
            cache_bytes: of decoded clips, in all.
            max_bad_fraction: the share of unreadable files, in [0, 1], up to which they are skipped.
            limits: what a file may ask for.

        Raises:
            UserError: the folder or a table is not as described, or too many files can't be read.
        """
        captions = captions or {"caption": 1.0}
        self.path = epath.Path(path)
        self.caption_weights = tuple(captions.values())
        self.limits = limits
        self.reasons: dict[str, str] = {}
        self._cache = _Cache(cache_bytes)
        rows = self._list(tuple(captions))
        self.info = self._check({row.file for row in rows}, max_bad_fraction)
        self.rows = [row for row in rows if row.file in self.info]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """What is left out and why, so far: a list of {`file`, `reason`}."""
        return [{"file": file, "reason": reason} for file, reason in list(self.reasons.items())]

    def read(self, file: str, cover: tuple[int, int], fps: float | None, start: int, count: int) -> np.ndarray:
        """Frames of a file, uint8 [t, h, w, 3], t ≤ count, covering (height, width).

        Raises:
            ClipError: the file does not give them.
        """
        return WATCHDOG.read_clip(self.path / file, fps, count, cover=cover, start=start, limits=self.limits)

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

    def _list(self, columns: tuple[str, ...]) -> list[Row]:
        if not self.path.is_dir():
            raise UserError(f"there is no data folder {self.path}: correct its path, or create it.")
        files: list[str] = []
        tables: list[tuple[str, epath.Path]] = []
        _explore(self.path, "", files, tables, set())
        files.sort()
        if not tables:
            if not files:
                raise UserError(
                    f"{self.path} holds no video and no image: put files in it that end in {', '.join(SUFFIXES)}."
                )
            return [Row(file, ("",) * len(columns)) for file in files]
        rows = []
        for prefix, table in sorted(tables):
            rows += [
                dataclasses.replace(row, file=prefix + row.file) for row in _read_table(table, columns, bool(prefix))
            ]
        named = {row.file for row in rows}
        for file in sorted(named.difference(files)):
            if not (self.path / file).is_file():
                table = max((entry for entry in tables if file.startswith(entry[0])), key=lambda entry: len(entry[0]))
                name = file.removeprefix(table[0])
                raise UserError(f"{table[1]} names {name}, which is not there: add the file, or remove its row.")
        self.reasons.update((file, "not in metadata.csv") for file in files if file not in named)
        return rows

    def _check(self, files: Iterable[str], max_bad_fraction: float) -> dict[str, ClipInfo]:
        """What the files hold that can be read; the others are entered in the account of the skipped ones."""
        files = sorted(files)

        def look(file: str) -> ClipInfo | str:
            try:
                return WATCHDOG.call(self.limits.wall_seconds, describe, self.path / file, self.limits)
            except ClipError as error:
                return str(error)

        with futures.ThreadPoolExecutor(CHECK_THREADS) as pool:
            progress = tqdm.tqdm(
                pool.map(look, files),
                f"checking {self.path}",
                len(files),
                unit="file",
                delay=3,
                leave=False,
                disable=None,
            )
            found = dict(zip(files, progress, strict=True))
        bad = {file: reason for file, reason in found.items() if isinstance(reason, str)}
        if len(bad) > max_bad_fraction * len(files):
            file, reason = next(iter(bad.items()))
            raise UserError(
                f"{len(bad)} of {len(files)} files in {self.path} can't be read, the first being {file} ({reason}): "
                f"remove {'it' if len(bad) == 1 else 'them'}, or raise --config.data.max_bad_fraction, now "
                f"{max_bad_fraction:g}."
            )
        self.reasons.update(bad)
        return {file: info for file, info in found.items() if isinstance(info, ClipInfo)}


class FolderClips:
    """The clips of one split of a folder, in given shapes.

    The table's column `split` (train, val or test), where there is one, decides what is held out. Otherwise a hash of
    the file name holds out one file in eight, so that a file stays in its split when others come and go.

    Attributes:
        captions: of all clips, "" for clips that have none (unconditional).
    """

    def __init__(self, folder: Folder, split: str, shapes: Sequence[ClipShape], fps: float | None):
        """Checks that some clip is long enough.

        Args:
            folder: see `Folder`.
            split: "train" or "held_out"; a folder of a single clip has it in both.
            shapes: of samples. A clip that is too short for the one that is drawn gets another.
            fps: frames per second of a sample; None takes every frame of the file.

        Raises:
            UserError: no clip belongs to the split, or none of it is long enough.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, not one of {SPLITS}")
        self.folder, self.split, self.shapes, self.fps = folder, split, tuple(shapes), fps
        self._rows = _of_split(folder.rows, split)
        self._skipped: set[str] = set()
        self.captions = [
            caption for row in self._rows for caption in dict.fromkeys(row.captions) if caption or not any(row.captions)
        ]
        if not self._rows:
            raise UserError(
                f"no readable clip in {folder.path} belongs to the {split} split: add clips, or correct the column "
                "split of its metadata.csv."
            )
        # Now rather than after the model has been compiled: raises where no clip is long enough.
        for index in range(len(self._rows)):
            if self.sample(index, np.random.default_rng(0)) is not None:
                break

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def kept(self) -> int:
        """How many clips can be used, as far as they have been read."""
        return sum(row.file not in self._skipped for row in self._rows)

    def files(self) -> list[ClipInfo]:
        """What the headers of the clips' files say, of each file once."""
        return [self.folder.info[file] for file in dict.fromkeys(row.file for row in self._rows)]

    def file(self, index: int) -> str:
        """A clip's file, relative to the folder."""
        return self._rows[index].file

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """A random window of a clip in one of the shapes, randomly cropped; the same `rng` gives the same bytes.

        Returns:
            {`video`: uint8 [frames, height, width, 3], RGB, `caption`: str, `shape`: its index}, or None for a clip
            that proves too short or unreadable; the folder's `skipped` then lists it.

        Raises:
            UserError: this was the last usable clip.
        """
        row = self._rows[index]
        if row.file in self._skipped:
            return None
        longest = 0
        try:
            for number in drawn_order(self.shapes, rng):
                video, frames = self._cut(row.file, self.shapes[number], rng)
                if video is not None:
                    return {"video": video, "caption": self._caption(row, rng), "shape": number}
                longest = max(longest, frames)
        except ClipError as error:
            return self._skip(row.file, str(error))
        return self._skip(row.file, f"too short: {longest} of {self._wanted()}")

    def _cut(self, file: str, shape: ClipShape, rng: np.random.Generator) -> tuple[np.ndarray | None, int]:
        """uint8 [frames, height, width, 3], or None where the clip is too short; and how many frames there were."""
        folder, info = self.folder, self.folder.info[file]
        height, width = shape.size(info.height, info.width)
        clip = folder.whole(file, (height, width), self.fps, shape.span)
        if clip is None:
            start = int(rng.integers(max(0, folder.length(file, self.fps) - shape.span) + 1))
            clip = self._window(file, (height, width), start, shape.span)
        elif len(clip) >= shape.span:
            start = int(rng.integers(len(clip) - shape.span + 1))
            clip = clip[start : start + shape.span]
        if len(clip) < shape.span:
            return None, len(clip)
        top = int(rng.integers(clip.shape[1] - height + 1))
        left = int(rng.integers(clip.shape[2] - width + 1))
        # A copy: a view would let the caller write into the cache.
        return clip[:: shape.stride, top : top + height, left : left + width].copy(), len(clip)

    def _window(self, file: str, cover: tuple[int, int], start: int, count: int) -> np.ndarray:
        """So many frames from `start` on, or the first ones where the file ends earlier than its header says."""
        if start:
            try:
                clip = self.folder.read(file, cover, self.fps, start, count)
                if len(clip) == count:
                    return clip
            except ClipError:
                pass
        return self.folder.read(file, cover, self.fps, 0, count)

    def _caption(self, row: Row, rng: np.random.Generator) -> str:
        """One of a clip's captions, by the weights of those that aren't empty."""
        given = [(text, weight) for text, weight in zip(row.captions, self.folder.caption_weights, strict=True) if text]
        if len(given) < 2:
            return given[0][0] if given else ""
        weights = np.array([weight for _, weight in given])
        return given[rng.choice(len(given), p=weights / weights.sum())][0]

    def _skip(self, file: str, reason: str) -> None:
        self._skipped.add(file)
        self.folder.reasons[file] = reason
        if all(row.file in self._skipped for row in self._rows):
            raise UserError(
                f"no clip of {self.folder.path}'s {self.split} split gives {self._wanted()}; {file}, for one, does not "
                f"({reason}): use longer clips, or ask for fewer frames or more frames per second."
            )

    def _wanted(self) -> str:
        span = min(shape.span for shape in self.shapes)
        return f"{span} frames" + (f" at {self.fps:g} fps" if self.fps else "")


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


def _explore(
    folder: epath.Path, prefix: str, files: list[str], tables: list[tuple[str, epath.Path]], seen: set[str]
) -> None:
    """Finds the files with a video's or a picture's suffix, and the tables, in a folder and its sub-folders.

    Hidden ones are systems' own. A link that leads back to a folder on the way to it is left alone.
    """
    real = os.path.realpath(folder) if "://" not in os.fspath(folder) else os.fspath(folder)
    if real in seen:
        return
    seen = seen | {real}
    for name in TABLES:
        if (folder / name).is_file():
            tables.append((prefix, folder / name))
            break
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        # By the name first: on a remote disk, each `is_dir` is a message.
        if path.suffix.lower() in SUFFIXES:
            files.append(prefix + path.name)
        elif path.is_dir():
            _explore(path, f"{prefix}{path.name}/", files, tables, seen)


def _read_table(table: epath.Path, columns: tuple[str, ...], may_lack: bool) -> list[Row]:
    """The rows of a metadata.csv or metadata.jsonl; a sub-folder's may lack a caption's column."""
    try:
        # utf-8-sig: spreadsheet programs put a byte-order mark in front.
        text = table.read_bytes().decode("utf-8-sig")
        if table.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            lines = list(csv.DictReader(io.StringIO(text, newline="")))
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{table} can't be read as CSV ({error}): write it anew.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{table} has a line that is no JSON ({error}): write one object a line.") from error
    if not lines:
        raise UserError(f"{table} names no clip: add a line file_name,caption and a row for each clip, or remove it.")
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{table} has a line that is no JSON object: write one object a line.")
    for column in ("file_name", *(() if may_lack else columns)):
        if column not in lines[0]:
            also = " and ".join(("file_name", *columns))
            raise UserError(f"{table} has no column {column}: its first line must name {also}.")
    return [_row(line, table, columns) for line in lines]


def _row(line: Mapping[str, Any], table: epath.Path, columns: tuple[str, ...]) -> Row:
    captions = tuple(str(line.get(column) or "").strip() for column in columns)
    file = str(line.get("file_name") or "").strip()
    if not file:
        raise UserError(f"{table} has a row without a file_name ({captions[0]!r}): fill it in, or remove the row.")
    if file.startswith("/") or ".." in file.split("/"):
        raise UserError(f"{table} names {file}, which lies outside of its folder: move the file, or remove the row.")
    split = None
    if "split" in line:
        word = str(line["split"] or "").strip().lower()
        if word not in SPLIT_COLUMN:
            raise UserError(f"{table} puts {file} in the split {word!r}: write one of {', '.join(SPLIT_COLUMN)}.")
        split = SPLIT_COLUMN[word]
    return Row(file.removeprefix("./"), captions, split)


def _of_split(rows: list[Row], split: str) -> list[Row]:
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
