"""Folders in object stores, such as gs://BUCKET/FOLDER: whether they can be reached, and what their errors mean."""

import logging
import os
import pathlib
import re

import fsspec
from etils import epath

from walt_jax.errors import Interrupted, UserError, reason_of

# Remote schemes, and the package that each needs.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}

# The packages whose exceptions may come of a remote file system.
RAISING = ("aiohttp", "fsspec", "gcsfs", "google", "requests")
REFUSED = re.compile("forbidden|permission|credentials|does not have|anonymous", re.IGNORECASE)  # in their messages


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def check_reachable(path: epath.PathLike) -> None:
    """Checks that a path can be written in JSON, and that a remote one can be read.

    Raises:
        UserError: if its name is not UTF-8, its scheme is not supported, a package is missing, or the remote end
            refuses.
    """
    if (printable := utf8(str(path))) != str(path):
        raise UserError(f"The name {printable} is not UTF-8: rename the folder.")
    scheme, remote, _ = str(path).partition("://")
    if not remote:
        return
    if scheme not in PACKAGES:
        raise UserError(
            f"{path} can't be read, {scheme}:// is not supported: copy the files to a local folder, or name one of "
            f"{', '.join(f'{name}://' for name in PACKAGES)}."
        )
    # Other processes, and TensorStore in this one, write files that cached listings would not have.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise UserError(
            f"{path} needs the package {PACKAGES[scheme]}: install it with pip install {PACKAGES[scheme]}."
        ) from error
    except Exception as error:  # whatever a remote file system may raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} can't be reached ({reason}): check its address, network and credentials.") from error


def check_bucket(path: epath.PathLike, what: str) -> None:
    """Checks that a folder gs://BUCKET/… can be reached, and its bucket exists.

    Args:
        path: the folder.
        what: names it in the message, such as "--workdir=gs://bucket/run".

    Raises:
        UserError: if not, as `check_reachable`, or the path names no folder in a bucket.
    """
    check_reachable(path)
    bucket, _, folder = str(path).removeprefix("gs://").partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(f"{what} names no folder of a bucket; name one, as in gs://BUCKET/FOLDER.")
    if not epath.Path(f"gs://{bucket}").exists():
        raise UserError(
            f"{what}: there is no bucket {bucket} that this account may read; check the name, make it with gcloud "
            f"storage buckets create gs://{bucket}, or log in with gcloud auth application-default login."
        )


def resolved(path: pathlib.Path) -> pathlib.Path:
    """The absolute path; a remote one is that already, and epath's own method would take it for a local one."""
    return path if is_remote(path) else path.resolve()


def as_user_error(error: BaseException, where: epath.PathLike, otherwise: str = "") -> UserError | None:
    """The sentence for an error of a remote file system; None of other errors.

    Args:
        error: of gcsfs or what it uses; of TensorStore, which raises Python's own, its message names an HTTP status.
        where: the remote folder.
        otherwise: said at the end, such as what has been saved.
    """
    reason = reason_of(error).partition(" [")[0]  # then come the answer's parts, as TensorStore has them
    remote = type(error).__module__.partition(".")[0] in RAISING or reason.startswith("Forbidden")  # as gcsfs has it
    if not remote and "[http_" not in str(error):
        return None
    if REFUSED.search(reason):
        return UserError(f"{where} can't be used ({reason}){otherwise}; check credentials and permissions.")
    return Interrupted(f"{where} can't be reached ({reason}){otherwise}; the same command goes on, once it can be.")


def utf8(name: str) -> str:
    """A file's name, with the bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
