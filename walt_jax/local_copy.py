"""Files of remote folders on this machine, for readers that open local files alone, as ArrayRecord's."""

import concurrent.futures
import fcntl
import hashlib
import os
import pathlib
import shutil

from etils import epath

from walt_jax.errors import UserError

THREADS = 8


def copies_folder() -> pathlib.Path:
    """Where copies are kept, for all processes and runs of this machine."""
    return pathlib.Path.home() / ".cache" / "walt_jax" / "copies"


def local_copy(folder: epath.Path, version: str) -> epath.Path:
    """The local copy of a folder's files. Those that are there already are not copied again.

    Args:
        folder: remote, without sub-folders.
        version: another one is another copy.

    Raises:
        UserError: if the disk has no room for it.
    """
    here = copies_folder() / hashlib.sha256(f"{folder}\n{version}".encode()).hexdigest()[:16]
    here.mkdir(parents=True, exist_ok=True)
    with (here / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of this machine wait, and find the files
        missing = [path for path in sorted(folder.iterdir()) if not (here / path.name).exists()]
        needed, free = sum(path.stat().length for path in missing), shutil.disk_usage(here).free
        if needed > free:
            raise UserError(
                f"{folder} is copied to {here} to be read, which takes {needed / 1e9:.2g} GB of {free / 1e9:.2g} GB "
                "left; free some space there."
            )
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda path: _copy(path, here), missing))
    return epath.Path(here)


def _copy(path: epath.Path, here: pathlib.Path) -> None:
    temporary = here / f".{path.name}.tmp"
    temporary.write_bytes(path.read_bytes())
    os.replace(temporary, here / path.name)
