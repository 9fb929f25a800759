"""The folder of a run: whose it is, and who may write to it."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from etils import epath

from walt_jax.errors import UserError
from walt_jax.parallel.processes import is_first, leave
from walt_jax.remote import check_bucket, is_remote

if TYPE_CHECKING:
    from PIL import Image

CONFIG = "config.json"
OURS = (
    "lock",
    f"{CONFIG}.tmp",
    "plan.json",
    "benchmark.json",
    "data.json",
    "data.png",
    "encoded",
)  # what may be in a workdir before a run is
# What may differ between two commands on one run: none of it changes what is trained.
FREE_GROUPS = ("sampling", "evaluation", "mesh")
FREE_KNOBS = (
    "rules",
    "accumulate",
    "remat",
    "peak_flops_per_second",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "keep_metric",
    "keep_every_hours",
    "preview_every",
    "validate_every",
    "cache_bytes",
    "max_bad_fraction",
)


def folder_of(name: str, flag: str = "--workdir") -> pathlib.Path:
    """The folder of a run that a flag or knob names: local, or gs://BUCKET/FOLDER.

    The latter is a path of `etils.epath`, which has the methods of `pathlib` that are used with workdirs.

    Raises:
        UserError: if it is elsewhere, or can't be reached.
    """
    if not is_remote(name):
        return pathlib.Path(name)
    if not name.startswith("gs://"):
        raise UserError(f"{flag}={name} is remote, and runs are kept in local folders and on gs://; name one of these.")
    check_bucket(name, f"{flag}={name}")
    return epath.Path(name.rstrip("/"))


def local(name: str, mode: str, flag: str = "--workdir") -> pathlib.Path:
    """The folder that a flag names, in a mode that needs it on this machine.

    Raises:
        UserError: if it is remote.
    """
    if is_remote(name):
        raise UserError(
            f"{flag}={name} is remote, and --mode={mode} writes to a local folder; name one. A run is copied with "
            f"gcloud storage cp -r {name} FOLDER."
        )
    return pathlib.Path(name)


def write_atomically(path: pathlib.Path, content: bytes | str) -> None:
    """The file is there with all of its content, or as it was before; its folder is made where it isn't there.

    Of several processes the first one writes.
    """
    if not is_first():
        return
    if is_remote(path):  # an object is there with all of its content, or as it was
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_picture(path: pathlib.Path, picture: "Image.Image") -> None:
    """Writes a PNG as `write_atomically` does: a viewer never sees half of it."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    write_atomically(path, content.getvalue())


@contextlib.contextmanager
def locked(workdir: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Refuses a second writer. The lock goes with its process, however that ends; of several the first one has it.

    That of a remote folder is removed by its process, or taken over once that has been killed, see `lease`.

    Args:
        workdir: the folder; it is made where it isn't there.
        flag: what names the folder on the command line.

    Raises:
        UserError: if another process writes to the folder, or it can't be made.
    """
    if not is_first():
        yield
        return
    if is_remote(workdir):
        from walt_jax.lease import leased, open_store

        with leased(open_store(str(workdir)), str(workdir), flag, _end):
            yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("w")
    except OSError as error:
        raise UserError(f"{flag}={workdir} can't be written to ({error.strerror}); choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is writing to {workdir}; wait for it or stop it, or choose another {flag}."
            ) from error
        yield


def _end(sentence: str) -> NoReturn:
    """Ends this process at once; its main thread may be anywhere."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    leave(1, sentence)
    os._exit(1)


def copy_folder(
    source: pathlib.Path, to: pathlib.Path, left_out: Callable[[Sequence[str]], Sequence[str]] = lambda names: ()
) -> None:
    """Copies a folder's files, either of them local or remote.

    Args:
        source: the folder.
        to: where its files go.
        left_out: which of a folder's names are not copied.
    """
    if not is_remote(to):
        to.mkdir(parents=True, exist_ok=True)
    paths = sorted(source.iterdir())
    unneeded = set(left_out([path.name for path in paths]))
    for path in paths:
        if path.name in unneeded:
            continue
        if path.is_dir():
            copy_folder(path, to / path.name, left_out)
        else:
            (to / path.name).write_bytes(path.read_bytes())


def remove_folder(path: pathlib.Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    epath.Path(path).rmtree(missing_ok=True)


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The knobs that the workdir's run was started with, or None where there is none.

    Raises:
        UserError: if the file that holds them is damaged.
    """
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        knobs = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); restore it, or start in another --workdir.") from error
    if not isinstance(knobs, dict):
        raise UserError(f"{path} holds no knobs; restore it, or start in another --workdir.")
    return knobs


def check_empty(workdir: pathlib.Path) -> None:
    """Checks that a workdir without a config is empty.

    Raises:
        UserError: if it holds files that are no run.
    """
    strangers = sorted(path.name for path in workdir.iterdir() if path.name not in OURS) if workdir.exists() else []
    if strangers:
        raise UserError(
            f"--workdir={workdir} holds {strangers[0]} but no {CONFIG}, so it is not a run; choose an empty folder."
        )


def claim(workdir: pathlib.Path, knobs: dict[str, Any]) -> None:
    """Writes the run's knobs into its workdir."""
    write_atomically(workdir / CONFIG, json.dumps(knobs, indent=1) + "\n")


def check_same(workdir: pathlib.Path, before: dict[str, Any], knobs: dict[str, Any]) -> None:
    """Checks the knobs of a run against those that its models were trained with; sampling and evaluation are free.

    Raises:
        UserError: if they differ.
    """
    orders = [list(group["stages"]) for group in (before, knobs)]
    if sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]:
        raise UserError(
            f"{workdir} holds a run of another config: its stages are {', '.join(orders[0])} in this order, not "
            f"{', '.join(orders[1])}; choose another --workdir, or the config it was started with."
        )
    old, new = (flatten({k: v for k, v in group.items() if k not in FREE_GROUPS}) for group in (before, knobs))
    different = [
        name for name in {**old, **new} if old.get(name) != new.get(name) and name.rsplit(".", 1)[-1] not in FREE_KNOBS
    ]
    if different:
        name, others = different[0], len(different) - 1
        also = f" (and {others} more)" if others else ""
        raise UserError(
            f"{workdir} holds a run of another config: config.{name} is {old.get(name)!r} there and {new.get(name)!r} "
            f"here{also}; choose another --workdir, or the config it was started with."
        )


def flatten(knobs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"fps": 8}} to {"data.fps": 8}."""
    flat = {}
    for name, value in knobs.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
