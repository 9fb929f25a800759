"""A folder of captioned videos and images."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any

import tqdm
from etils import epath

from walt_jax.data.limits import ClipError
from walt_jax.data.store import WATCHDOG, Row, Store
from walt_jax.data.video import ClipInfo, describe
from walt_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".gif", ".mkv", ".ts", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
TABLES = ("metadata.csv", "metadata.jsonl")

# The words that data sets use in a metadata file's split column.
SPLIT_COLUMN = {"train": "train", "val": "held_out", "validation": "held_out", "test": "held_out"}

# Enough to hide the latency of a network disk; decoding itself is bound by the cores.
CHECK_THREADS = 4


def is_data_set(path: epath.PathLike) -> bool:
    """Whether a folder holds a data set in TFDS's format rather than files, see `records`."""
    return (epath.Path(path) / "dataset_info.json").exists()


class Folder(Store):
    """The clips of a folder, whatever is made of them.

    Which files: those with a video's or a picture's suffix, in sub-folders too, without captions; or, where the folder
    holds a `metadata.csv` or a `metadata.jsonl` with `file_name` (relative to the folder) and `caption`, one clip for
    each of its rows. A sub-folder may hold such a table of its own.
    """

    def _open(self, captions: Mapping[str, float], max_bad_fraction: float) -> None:
        rows = self._list(captions)
        self.info = self._check({row.file for row in rows}, max_bad_fraction)
        self.rows = [row for row in rows if row.file in self.info]

    def content(self, file: str) -> epath.Path:
        return self.path / file

    def _list(self, columns: Mapping[str, float]) -> list[Row]:
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
            return [Row(file) for file in files]
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


def _read_table(table: epath.Path, columns: Mapping[str, float], may_lack: bool) -> list[Row]:
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


def _row(line: Mapping[str, Any], table: epath.Path, columns: Mapping[str, float]) -> Row:
    captions = [(str(line.get(column) or "").strip(), weight) for column, weight in columns.items()]
    file = str(line.get("file_name") or "").strip()
    if not file:
        raise UserError(f"{table} has a row without a file_name ({captions[0][0]!r}): fill it in, or remove the row.")
    if file.startswith("/") or ".." in file.split("/"):
        raise UserError(f"{table} names {file}, which lies outside of its folder: move the file, or remove the row.")
    split = None
    if "split" in line:
        word = str(line["split"] or "").strip().lower()
        if word not in SPLIT_COLUMN:
            raise UserError(f"{table} puts {file} in the split {word!r}: write one of {', '.join(SPLIT_COLUMN)}.")
        split = SPLIT_COLUMN[word]
    return Row(file.removeprefix("./"), tuple(caption for caption in captions if caption[0]), split)
