"""A folder of captioned videos and images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from walt_jax.data.listing import TABLES, read_table, walk
from walt_jax.data.store import Row, Store
from walt_jax.data.suffixes import SUFFIXES
from walt_jax.data.video import ClipInfo
from walt_jax.errors import UserError

# Values of a table's split column.
SPLIT_COLUMN = {"train": "train", "val": "held_out", "validation": "held_out", "test": "held_out"}


def is_data_set(path: epath.PathLike) -> bool:
    """Whether a folder holds a data set in TFDS's format, see `records`, rather than media files."""
    return (epath.Path(path) / "dataset_info.json").exists()


class Folder(Store):
    """The clips of a folder of videos and images.

    With a `metadata.csv` or `metadata.jsonl` in the folder or in sub-folders, the clips are its rows: `file_name`,
    relative to the table, and `caption`. Without a table they are all files with a known suffix, found recursively,
    without captions.
    """

    def _open(self, captions: Mapping[str, float], max_bad_fraction: float) -> None:
        if self.path.is_file():
            raise UserError(
                f"{self.path} is a file; name the folder that it is in: --config.data.source={self.path.parent}."
            )
        if not self.path.is_dir():
            raise UserError(f"there is no data folder {self.path}: correct its path, or create it.")
        files, others, misnamed, tables = walk(self.path, SUFFIXES)
        rows = self._rows(files, tables, captions)
        named = {row.file for row in rows}
        self.reasons.update((file, "not in metadata.csv") for file in files if file not in named)
        for file in others:
            if file not in named:
                self.reasons[file] = f"no video or image by its name: {epath.Path(file).suffix or 'it has no suffix'}"
        self.reasons.update((name, "its name is not UTF-8: rename it") for name in misnamed)
        self._warn_of_left_out(files, named, tables)
        if not rows:
            self.problems.append(
                f"{self.path} holds no video and no image: put files in it that end in {', '.join(SUFFIXES)}."
            )
        found = self.check_all(lambda file: self.look(self.content(file)), sorted(named), "file")
        self.keep(found, max_bad_fraction, "files", "remove " + ("it" if len(self._bad(found)) == 1 else "them"))
        self.rows = [row for row in rows if row.file in self.info]

    def content(self, file: str) -> epath.Path:
        return self.path / file

    def is_gone(self, file: str) -> bool:
        return not self.content(file).exists()

    @staticmethod
    def _bad(found: Mapping[str, ClipInfo | str]) -> list[str]:
        return [file for file, info in found.items() if isinstance(info, str)]

    def _rows(self, files: list[str], tables: list[tuple[str, epath.Path]], columns: Mapping[str, float]) -> list[Row]:
        """A row for each clip. An unusable table is a problem; then all files are clips."""
        if not tables:
            return [Row(file) for file in files]
        rows = []
        try:
            for prefix, table in tables:
                rows += [
                    dataclasses.replace(row, file=prefix + row.file) for row in _read_rows(table, columns, bool(prefix))
                ]
        except UserError as error:
            self.problems.append(str(error))
            return [Row(file) for file in files]
        missing = {row.file for row in rows}.difference(files)
        missing = {file for file in missing if not (self.path / file).is_file()}
        for file in sorted(missing):
            table = max((entry for entry in tables if file.startswith(entry[0])), key=lambda entry: len(entry[0]))
            name = file.removeprefix(table[0])
            self.problems.append(f"{table[1]} names {name}, which is not there: add the file, or remove its row.")
            self.reasons[file] = f"{table[1].name} names it, and it is not there"
        return [row for row in rows if row.file not in missing]

    def _warn_of_left_out(self, files: list[str], named: set[str], tables: list[tuple[str, epath.Path]]) -> None:
        """Warns if only sub-folders have tables, or if tables leave out most files."""
        out = [file for file in files if file not in named]
        top = any(not prefix for prefix, _ in tables)
        if out and tables and (not top or len(out) > len(files) / 2):
            found = "the only table" if len(tables) == 1 else f"the first of {len(tables)} tables"
            self.warnings.append(
                f"{len(out)} of {len(files)} files in {self.path} are left out, as no table names them ({found} is "
                f"{tables[0][1]}): add rows for them to {self.path / TABLES[0]}, or remove the table."
            )


def _read_rows(table: epath.Path, captions: Mapping[str, float], may_lack: bool) -> list[Row]:
    """The rows of a table; `may_lack`: whether caption columns may be missing, as in sub-folders."""
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
