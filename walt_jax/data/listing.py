"""Lists what is in folders, and reads the tables of captions there."""

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from walt_jax.errors import UserError

TABLES = ("metadata.csv", "metadata.jsonl")  # of a folder, the first that is there


class Listing(NamedTuple):
    """What is in a folder and its sub-folders.

    Attributes:
        files: those with a wanted suffix, by their names relative to the folder, sorted.
        tables: (name of the folder that it is in, with a slash at the end, or "", and the table), sorted.
    """

    files: list[str]
    tables: list[tuple[str, epath.Path]]


def walk(folder: epath.Path, suffixes: Sequence[str]) -> Listing:
    """Finds files by their suffix, and tables, in a folder and its sub-folders, local or remote.

    Hidden ones are systems' own. A link that leads back to a folder on the way to it is left alone.
    """
    found = Listing([], [])
    _walk(folder, "", tuple(suffixes), found, frozenset())
    found.files.sort()
    found.tables.sort()
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
        # By the name first: on a remote disk, each `is_dir` is a message.
        if path.suffix.lower() in suffixes:
            found.files.append(prefix + path.name)
        elif path.is_dir():
            _walk(path, f"{prefix}{path.name}/", suffixes, found, above | {real})


def read_table(table: epath.Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a metadata.csv or metadata.jsonl, which are those of its first line, and its rows.

    Raises:
        UserError: it is neither.
    """
    text = read_text(table)
    try:
        if table.suffix != ".jsonl":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            return list(reader.fieldnames or ()), list(reader)
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except csv.Error as error:
        raise UserError(f"{table} can't be read as CSV ({error}): write it anew.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{table} has a line that is no JSON ({error}): write one object a line.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{table} has a line that is no JSON object: write one object a line.")
    return list(rows[0]) if rows else [], rows


def read_text(file: epath.Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        # utf-8-sig: spreadsheet programs put a byte-order mark in front.
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
