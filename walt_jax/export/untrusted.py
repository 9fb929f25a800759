"""Checks of what others may have written: files within their folder, and tensors that the config asks for."""

import pathlib

import jax

from walt_jax.errors import UserError

Shapes = dict[str, jax.ShapeDtypeStruct]
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file or folder within a folder, by a name that a file in it states.

    Raises:
        UserError: if it leads out of the folder, does not exist, or is neither a file nor a folder.
    """
    path = folder / name
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads out of {folder}, and nothing else is read; copy the file itself to there.")
    if not (real.is_file() or real.is_dir()):
        raise UserError(f"{path} is missing or no file; restore it from a copy, or export again.")
    return path


def check_names(path: pathlib.Path, found: set[str], wanted: set[str]) -> None:
    """Compares the parameters of a file with those of the config.

    Raises:
        UserError: if one is missing, or one too many.
    """
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds")):
        if names:
            which = min(names)[:80]
            does = "has" if verb == "lacks" else "has no place for"
            raise UserError(
                f"{path} {verb} {which!r}, which the model of its config.json {does}; restore both from one export."
            )


def check_shape(path: pathlib.Path, name: str, shape: tuple[int, ...], kind: str, wanted: jax.ShapeDtypeStruct) -> None:
    """Compares a parameter with the config's.

    Raises:
        UserError: if its shape or type is another.
    """
    kind = KINDS.get(kind, kind)
    if shape != wanted.shape or kind != wanted.dtype.name:
        raise UserError(
            f"{path} holds {name} of {kind} {list(shape)}, and the model of its config.json has {wanted.dtype.name} "
            f"{list(wanted.shape)}; restore both from one export."
        )
