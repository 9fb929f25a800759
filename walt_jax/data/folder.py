"""A folder of captioned videos and images."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from walt_jax.data.listing import read_table, walk
from walt_jax.data.store import Row, Store
from walt_jax.data.video import ClipInfo
from walt_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".gif", ".mkv", ".ts", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

# The words that data sets use in a metadata file's split column.
SPLIT_COLUMN = {"train": "train", "val": "held_out", "validation": "held_out", "test": "held_out"}


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
        files, tables = walk(self.path, SUFFIXES)
        if not tables:
            if not files:
                raise UserError(
                    f"{self.path} holds no video and no image: put files in it that end in {', '.join(SUFFIXES)}."
                )
            return [Row(file) for file in files]
        rows = []
        for prefix, table in tables:
            rows += [
                dataclasses.replace(row, file=prefix + row.file) for row in _read_rows(table, columns, bool(prefix))
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
        found = self.check_all(lambda file: self.look(self.content(file)), files, "file")
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


def _read_rows(table: epath.Path, captions: Mapping[str, float], may_lack: bool) -> list[Row]:
    """The rows of a table; a sub-folder's may lack a caption's column."""
    columns, lines = read_table(table)
    if not lines:
        raise UserError(f"{table} names no clip: add a line file_name,caption and a row for each clip, or remove it.")
    for column in ("file_name", *(() if may_lack else captions)):
        if column not in columns:
            also = " and ".join(("file_name", *captions))
            raise UserError(f"{table} has no column {column}: its first line must name {also}.")
    return [_row(line, table, captions) for line in lines]


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
