"""Lists raw videos: of a folder, with captions, or of a text file with paths."""

import dataclasses
import hashlib
import sys

from etils import epath

from walt_jax.data.listing import read_table, read_text, walk
from walt_jax.data.suffixes import VIDEO_SUFFIXES
from walt_jax.errors import UserError

TABLE = "metadata.csv"


@dataclasses.dataclass(frozen=True)
class RawVideo:
    """A video to be cut into scenes.

    Attributes:
        name: unique: the path relative to the folder, or the line of the list.
        uri: path or URI.
        captions: of `metadata.csv`, if any.
    """

    name: str
    uri: str
    captions: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of the name: prefix of the video's files. Sorting by it shuffles videos."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:32]


def list_raw(source: epath.PathLike) -> tuple[list[RawVideo], list[str]]:
    """The videos of a folder, or of a text file with one path or URI per line: each once, sorted by name.

    Args:
        source: local or remote. Folders are searched recursively, without hidden files.

    Returns:
        The videos, and the names that were listed more than once.

    Raises:
        UserError: there is no such folder or file, it can't be read, or it has no video.
    """
    source = epath.Path(source)
    if source.is_dir():
        return _of_folder(source), []
    if source.is_file():
        return _of_list(source)
    raise UserError(f"config.prepare.source={source} is not there; name a folder of videos or a text file of paths.")


def _of_folder(folder: epath.Path) -> list[RawVideo]:
    captions = _captions(folder / TABLE)
    listing = walk(folder, VIDEO_SUFFIXES)
    if listing.misnamed:
        print(
            f"warning: {len(listing.misnamed)} files or folders in {folder} are left out, whose names are not UTF-8, "
            f"the first being {listing.misnamed[0]}: rename them.",
            file=sys.stderr,
        )
    names = sorted({*listing.files, *captions})
    if not names:
        raise UserError(f"{folder} holds no video; put files in it that end in {', '.join(VIDEO_SUFFIXES)}.")
    return [RawVideo(name, str(folder / name), tuple(captions.get(name, ()))) for name in names]


def _captions(table: epath.Path) -> dict[str, list[str]]:
    """The captions of each file in the table, in the order of its rows; {} if there is no table."""
    if not table.exists():
        return {}
    columns, rows = read_table(table)
    if not {"file_name", "caption"} <= set(columns):
        raise UserError(f"{table} has no columns file_name and caption; its first line must name them.")
    captions = {}
    for row in rows:
        name = (row["file_name"] or "").strip().removeprefix("./")
        text = (row["caption"] or "").strip()
        if name:
            captions.setdefault(name, []).extend([text] if text else [])
    return captions


def _of_list(file: epath.Path) -> tuple[list[RawVideo], list[str]]:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} names no video; write a path or URI a line.")
    first, again = set(), []
    for line in lines:
        if line in first:
            again.append(line)
        first.add(line)
    uri = {line: line if "://" in line else str(file.parent / line) for line in first}
    return [RawVideo(line, uri[line]) for line in sorted(first)], again
