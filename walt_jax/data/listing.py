"""Lists folders, and reads their tables of captions."""

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from walt_jax.errors import UserError
from walt_jax.remote import utf8

TABLES = ("metadata.csv", "metadata.jsonl")  # the first that exists in a folder is read


class Listing(NamedTuple):
    """The content of a folder and its sub-folders; all lists are sorted, all names relative to the folder.

    Attributes:
        files: files with one of the suffixes.
        others: other files.
        misnamed: files and folders whose names are not UTF-8, with the offending bytes as \\xNN.
        tables: (its folder's name with a slash at the end, or "" for the top one; the table's path).
    """

    files: list[str]
    others: list[str]
    misnamed: list[str]
    tables: list[tuple[str, epath.Path]]


def walk(folder: epath.Path, suffixes: Sequence[str]) -> Listing:
    """Lists a folder recursively, local or remote.

    Hidden files are skipped, and so are links to a folder above.
    """
    found = Listing([], [], [], [])
    _walk(folder, "", tuple(suffixes), found, frozenset())
    for names in found:
        names.sort()
    return found


def _walk(folder: epath.Path, prefix: str, suffixes: tuple[str, ...], found: Listing, above: frozenset[str]) -> None:
    real = os.path.realpath(folder) if "://" not in os.fspath(folder) else os.fspath(folder)
    if real in above:
        return
    for name in TABLES:
        if (folder / name).is_file():
            found.tables.append((prefix, folder / name))
            break
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if (printable := utf8(path.name)) != path.name:  # neither JSON nor the terminal can take such a name
            found.misnamed.append(prefix + printable)
            continue
        # Suffix first: on a remote disk each `is_dir` is a request.
        if path.suffix.lower() in suffixes:
            found.files.append(prefix + path.name)
        elif path.is_dir():
            _walk(path, f"{prefix}{path.name}/", suffixes, found, above | {real})
        elif path.name not in TABLES:
            found.others.append(prefix + path.name)


def read_table(table: epath.Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a metadata.csv or metadata.jsonl, taken from its first line, and its rows.

    Raises:
        UserError: it can't be parsed.
    """
    text = read_text(table)
    try:
        if table.suffix != ".jsonl":
            return _read_csv(table, csv.DictReader(io.StringIO(text, newline="")))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except csv.Error as error:
        raise UserError(f"{table} can't be read as CSV ({error}): write it anew.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table} has a line that is no JSON ({error}): write one object a line.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{table} has a line that is no JSON object: write one object a line.")
    return list(rows[0]) if rows else [], rows


def _read_csv(table: epath.Path, reader: csv.DictReader) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and rows of a comma-separated table."""
    columns, rows = list(reader.fieldnames or ()), []
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(columns) == 1 and separator in columns[0]:
            raise UserError(f"{table} is separated by {name}: save it with commas between the columns.")
    for row in reader:
        if None in row:
            raise UserError(
                f"{table} has {len(columns) + len(row[None])} fields in line {reader.line_num}, where its first line "
                f'has {len(columns)}: put a text with a comma in quotes, as in "a dog, running".'
            )
        rows.append(row)
    return columns, rows


def read_text(file: epath.Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        # utf-8-sig: spreadsheet programs write a byte-order mark.
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
