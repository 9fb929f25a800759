"""A checkpoint's manifest: its files with their sizes and SHA-256, so that damage is found before anything is loaded.

Orbax checks JSON and TensorStore's indices when it reads them, but not the arrays' bytes: a flipped bit would load
unseen. Digests are computed and compared in threads, as `hashlib` releases the interpreter's lock.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

MANIFEST = "manifest.json"
# Written by Orbax after the manifest, when it commits a checkpoint.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
THREADS = 8


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of a checkpoint, whose other files are complete."""
    files = [path for path in _files(folder) if path.relative_to(folder).as_posix() not in LATER]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        rows = dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(_entry, files), strict=True))
    (folder / MANIFEST).write_text(json.dumps({"files": rows}, indent=1) + "\n")


def damage(folder: epath.Path, items: Iterable[str], part: int = 0, of: int = 1) -> str | None:
    """Compares a checkpoint with its manifest.

    Args:
        folder: of the checkpoint.
        items: the folders in it that will be read; the others may be absent.
        part, of: of their files each `of`-th is compared, from number `part` on.

    Returns:
        What is wrong, for a sentence, or None. None as well where there is no manifest, see `has_manifest`.
    """
    if not has_manifest(folder):
        return None
    try:
        rows: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
        wanted = {name: (row["bytes"], row["sha256"]) for name, row in rows.items() if name.split("/")[0] in set(items)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} can't be read"
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda entry: _wrong(folder, entry[0], *entry[1]), sorted(wanted.items())[part::of])
        return next(filter(None, found), None)


def has_manifest(folder: epath.Path) -> bool:
    """Whether there is a manifest; checkpoints of older versions have none."""
    return (folder / MANIFEST).exists()


def _wrong(folder: epath.Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    try:
        found = path.stat().length
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
        if _sha256(path) != digest:
            return f"{name} has changed since it was written: its SHA-256 is another"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read: {error.strerror or error}"
    return None


def _entry(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": _sha256(path)}


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
