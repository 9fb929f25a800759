"""Reads a cluster's TOML file into a dataclass: every wrong or unknown key is one sentence."""

import dataclasses
import pathlib
import re
import tomllib
import types
from typing import Any, TypeVar

Cluster = TypeVar("Cluster")

# Names of queued resources, JobSets and jobs; the longest that Kubernetes leaves room for its suffixes.
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
EXAMPLES = "those in launch/clusters/"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class LaunchError(Exception):
    """A mistake that the user can mend, in one sentence with the remedy; the launcher exits with 1."""


def read(kind: type[Cluster], path: str) -> Cluster:
    """The cluster that a TOML file describes.

    `kind` is a dataclass of str, int, bool, optional ones of these and dict[str, str]; fields without a default are
    required. Its `__post_init__` raises ValueError for values that don't fit one another.

    Raises:
        LaunchError: if the file can't be read, or a key is unknown, missing or of a wrong type.
    """
    try:
        table = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"--cluster={path} can't be read ({error.strerror}); name a file like {EXAMPLES}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path} is not TOML ({error}); correct that line.") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise LaunchError(f"{path}: {key} is no key of this kind of cluster; its keys are {', '.join(fields)}.")
        check(path, key, value, fields[key].type)
    missing = [name for name, field in fields.items() if field.default is field.default_factory and name not in table]
    if missing:
        raise LaunchError(f"{path}: {missing[0]} is missing; add it, as in {EXAMPLES}.")
    try:
        return kind(**table)
    except ValueError as error:
        raise LaunchError(f"{path}: {error}") from error


def check(path: str, key: str, value: Any, kind: Any) -> None:
    """Raises LaunchError if the value of a key is not of a kind, or could not be one argument of a command."""
    kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    if dict[str, str] in kinds:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise LaunchError(f"{path}: [{key}] should hold strings only, such as NAME = 'value'.")
        wrong = [name for name in value if not VARIABLE.fullmatch(name)]
        if wrong:
            raise LaunchError(f"{path}: [{key}] has {wrong[0]!r}, which is no name of an environment variable.")
        texts = list(value.values())
    else:
        if type(value) not in kinds:  # a bool is no int
            names = " or ".join(one.__name__ for one in kinds if one is not types.NoneType)
            raise LaunchError(f"{path}: {key} = {value!r} should be of type {names}.")
        texts = [value] if isinstance(value, str) else []
    for text in texts:
        if not text or not text.isprintable():
            raise LaunchError(f"{path}: {key} = {text!r} is empty or has unprintable characters; write printable text.")


def check_name(name: str) -> str:
    """The name of a run, if a cluster can take it.

    Raises:
        LaunchError: if not.
    """
    if not NAME.fullmatch(name):
        raise LaunchError(
            f"--name={name} should be at most 40 small letters, digits and hyphens, from a letter to no hyphen, such "
            "as walt-l-1."
        )
    return name
