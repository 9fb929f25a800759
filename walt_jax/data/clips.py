"""The clips of one split of a store, cut and cropped to the requested shapes."""

import collections
import copy
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from walt_jax.data.limits import ClipError
from walt_jax.data.shapes import ClipShape, drawn_order
from walt_jax.data.store import Row, Store
from walt_jax.data.video import ClipInfo
from walt_jax.errors import UserError

SPLITS = ("train", "held_out")
HELD_OUT_FRACTION = 1 / 8


class StoredClips:
    """The clips of one split of a store, cut and cropped to the requested shapes.

    The split is the rows', if they have one. Otherwise one file in eight is held out by a hash of its name, or of the
    name of the video that it was cut from, so that files stay in their split when others are added or removed.
    """

    def __init__(self, store: Store, split: str, shapes: Sequence[ClipShape], fps: float | None):
        """Checks that at least one clip is long enough.

        Args:
            store: see `Store`.
            split: "train" or "held_out"; both have the file of a store of a single file.
            shapes: of samples, drawn by weight. A clip that is too short for the drawn shape gets another one.
            fps: frames per second of a sample; None takes every frame of the file.

        Raises:
            UserError: no clip belongs to the split, or none is long enough.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, not one of {SPLITS}")
        self.store, self.split, self.shapes, self.fps = store, split, tuple(shapes), fps
        self._rows = _of_split(store.rows, split)
        self._skipped: set[str] = set()
        self._removed: frozenset[str] = frozenset()
        self._spans: dict[str, int] = {}  # frames that files have, where their headers say too few
        if not self._rows:
            skipped = "".join(f" ({file}: {reason})" for file, reason in list(store.reasons.items())[:1])
            raise UserError(
                f"no readable clip in {store.path} belongs to the {split} split{skipped}: add clips, or correct the "
                "column split of its metadata.csv."
            )
        # Raises if no clip is long enough: here rather than after the model has been compiled.
        for index in range(len(self._rows)):
            if self.sample(index, np.random.default_rng(0)) is not None:
                break

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def captions(self) -> list[str]:
        """All captions of all clips; "" for clips without one, which are unconditional."""
        return [text for row in self._rows for text in (dict(row.captions) or ("",))]

    @property
    def names(self) -> list[str]:
        """A name for each clip: its file's, with #2, #3, … where the file has several."""
        counts: collections.Counter[str] = collections.Counter()
        names = []
        for row in self._rows:
            counts[row.file] += 1
            names.append(row.file + (f"#{counts[row.file]}" if counts[row.file] > 1 else ""))
        return names

    def reindexed(self, names: Sequence[str]) -> "StoredClips":
        """The clips that have these names, in their order; one that is not there (any more) can't be used.

        Args:
            names: as `names` gives them.
        """
        rows = dict(zip(self.names, self._rows, strict=True))
        other = copy.copy(self)
        other._rows = [rows.get(name, Row(name)) for name in names]
        other._removed = frozenset(name for name in names if name not in rows)
        other._skipped = self._skipped | other._removed
        return other

    @property
    def kept(self) -> int:
        """The number of usable clips, as far as known: clips turn out to be unusable when they are read."""
        return sum(row.file not in self._skipped for row in self._rows)

    def files(self) -> list[ClipInfo]:
        """Header information of the clips' files, each file once."""
        return [self.store.info[file] for file in dict.fromkeys(row.file for row in self._rows)]

    def file(self, index: int) -> str:
        """The name of a clip's file in the store."""
        return self._rows[index].file

    def find_short(self) -> None:
        """Reads the clips that are too short by their headers, and enters those that are in `store.skipped`.

        Raises:
            UserError: no usable clip is left.
        """
        span = min(shape.span for shape in self.shapes)
        for index, row in enumerate(self._rows):
            if self.store.length(row.file, self.fps) < span:
                self.sample(index, np.random.default_rng(0))

    def kind(self, index: int, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
        """See `pipeline.Source`. A clip that is too short by its header is read, once."""
        file = self._rows[index].file
        if file in self._removed:
            return None
        info, length = self.store.info[file], self.store.length(file, self.fps)
        for number in drawn_order(self.shapes, rng):
            shape = self.shapes[number]
            if length >= shape.span or self._span(file) >= shape.span:
                return number, shape.frames, *shape.size(info.height, info.width)
        return None

    def _span(self, file: str) -> int:
        """The number of frames of a file, at most as many as a clip can span; 0 where it can't be read."""
        if file not in self._spans:
            span = max(shape.span for shape in self.shapes)
            try:
                self._spans[file] = len(self.store.read(file, (1, 1), self.fps, 0, span))
            except ClipError:
                self._spans[file] = 0
        return self._spans[file]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """A random window and crop of a clip in one of the shapes; equal states of `rng` give equal bytes.

        Returns:
            {`video`: uint8 [frames, height, width, 3], RGB, `caption`: str, `shape`: its index}, or None if the clip is
            too short or unreadable; the store's `skipped` then lists it.

        Raises:
            UserError: this was the last usable clip, or too many files have vanished.
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
            if self.store.is_gone(row.file):
                self.store.lose(row.file)
            return self._skip(row.file, str(error))
        return self._skip(row.file, f"too short: {longest} of {self._wanted()}")

    def _cut(self, file: str, shape: ClipShape, rng: np.random.Generator) -> tuple[np.ndarray | None, int]:
        """uint8 [frames, height, width, 3], or None if the clip is too short; and the number of frames that it has."""
        store, info = self.store, self.store.info[file]
        height, width = shape.size(info.height, info.width)
        # By the header's length, even if it is wrong, so that cached and newly decoded clips give the same window.
        start = int(rng.integers(max(0, store.length(file, self.fps) - shape.span) + 1))
        clip = store.whole(file, (height, width), self.fps, shape.span)
        if clip is None:
            clip = self._window(file, (height, width), start, shape.span)
        elif len(clip) >= shape.span:
            start = start if start + shape.span <= len(clip) else 0
            clip = clip[start : start + shape.span]
        if len(clip) < shape.span:
            return None, len(clip)
        top = int(rng.integers(clip.shape[1] - height + 1))
        left = int(rng.integers(clip.shape[2] - width + 1))
        # A copy, since writing into a view would change the cache.
        return clip[:: shape.stride, top : top + height, left : left + width].copy(), len(clip)

    def _window(self, file: str, cover: tuple[int, int], start: int, count: int) -> np.ndarray:
        """`count` frames from `start` on, or the first ones if the file ends earlier than its header says."""
        if start:
            try:
                clip = self.store.read(file, cover, self.fps, start, count)
                if len(clip) == count:
                    return clip
            except ClipError:
                pass
        return self.store.read(file, cover, self.fps, 0, count)

    def _caption(self, row: Row, rng: np.random.Generator) -> str:
        """One of a clip's captions, drawn by weight."""
        if len(row.captions) < 2:
            return row.captions[0][0] if row.captions else ""
        weights = np.array([weight for _, weight in row.captions])
        return row.captions[rng.choice(len(weights), p=weights / weights.sum())][0]

    def _skip(self, file: str, reason: str) -> None:
        self._skipped.add(file)
        self.store.reasons[file] = reason
        if all(row.file in self._skipped for row in self._rows):
            if all(self.store.info[row.file].frames == 1 for row in self._rows if row.file in self.store.info):
                raise UserError(
                    f"{self.store.path}'s {self.split} split holds images, and clips of {self._wanted()} are asked "
                    "for: set --config.data.frames=1, or give a stage a shape with frames=1."
                )
            raise UserError(
                f"no clip of {self.store.path}'s {self.split} split gives {self._wanted()}; {file}, for one, does not "
                f"({reason}): use longer clips, or ask for fewer frames or more frames per second."
            )

    def _wanted(self) -> str:
        span = min(shape.span for shape in self.shapes)
        return f"{span} frames" + (f" at {self.fps:g} fps" if self.fps else "")


def _of_split(rows: list[Row], split: str) -> list[Row]:
    if any(row.split for row in rows):
        return [row for row in rows if row.split == split]
    groups = {row.group or row.file for row in rows}
    if len(groups) == 1:
        return rows
    held_out = _held_out(groups)
    return [row for row in rows if ((row.group or row.file) in held_out) == (split == "held_out")]


def _held_out(files: Iterable[str]) -> set[str]:
    """One file in eight by a hash of its name; at least one, and not all if there are several."""
    by_hash = sorted((_uniform(file), file) for file in files)
    count = sum(number < HELD_OUT_FRACTION for number, _ in by_hash)
    count = max(1, min(count, len(by_hash) - 1))
    return {file for _, file in by_hash[:count]}


def _uniform(file: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") / 2**64
