"""Files that grow or are written by others' code, of a folder that may be in an object store.

An object can't be appended to, and TensorBoard's writer, the profiler and encoders of video write local files alone. So
they write to a folder on this machine, whose files are uploaded when they have changed. Of a local folder nothing is
copied: it is that folder itself.
"""

import contextlib
import functools
import pathlib
import sys
import tempfile
import threading
import time

from walt_jax.remote import is_remote

UPLOAD_SECONDS = 30.0


class Staging:
    """Where files of a folder are written.

    Args:
        target: the folder; where it is local, it is written to directly.

    Attributes:
        folder: to write to, local.
    """

    def __init__(self, target: pathlib.Path):
        self._target, self.folder = target, target
        self._sent: dict[str, tuple[int, int]] = {}  # of each file as it was uploaded: its time and size
        self._busy = threading.Lock()
        if is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="walt_jax_")
            self.folder = pathlib.Path(self._temporary.name)

    def file(self, name: str) -> pathlib.Path:
        """The local path of a file, which has what the folder's has."""
        path = self.folder / name
        if self.folder is not self._target and not path.exists() and (self._target / name).exists():
            path.write_bytes((self._target / name).read_bytes())
            self._sent[name] = _state(path)
        return path

    def upload(self) -> None:
        """Copies files that have changed to where the folder is."""
        if self.folder is self._target:
            return
        with self._busy:
            for path in sorted(self.folder.rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # a temporary file that has been renamed
                    if path.suffix == ".tmp" or not path.is_file() or self._sent.get(name) == _state(path):
                        continue
                    state, content = _state(path), path.read_bytes()
                    (self._target / name).write_bytes(content)
                    self._sent[name] = state

    def __enter__(self) -> pathlib.Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        self.upload()


@functools.cache
def staging(workdir: pathlib.Path) -> Staging:
    """Of a run's workdir, the same one for all that write to it; it is uploaded now and then, by a thread."""
    made = Staging(workdir)

    def upload() -> None:
        while True:
            time.sleep(UPLOAD_SECONDS)
            try:
                made.upload()
            except Exception as error:  # whatever a remote file system may raise; a checkpoint uploads again
                print(f"warning: {workdir} can't be written to now ({error}); it is tried again.", file=sys.stderr)

    if is_remote(workdir):
        threading.Thread(target=upload, daemon=True, name="upload").start()
    return made


def _state(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
