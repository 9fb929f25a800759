"""Orbax: a checkpoint of NumPy arrays, which loads on any devices and without this project's code."""

import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from walt_jax.errors import UserError, reason_of
from walt_jax.export.contents import Tensors
from walt_jax.export.untrusted import Shapes, check_names, check_shape, inside

FOLDER = "params"


def write(folder: pathlib.Path, tensors: Tensors) -> list[str]:
    """Writes parameters; returns the folder's name."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / FOLDER, unflatten_dict(tensors, sep="/"))
    return [FOLDER]


def read(folder: pathlib.Path, wanted: Shapes) -> Tensors:
    """Reads parameters. Names, shapes and types are compared with the config's before an array is read.

    Raises:
        UserError: if files are missing, damaged or lead out of the folder, or hold something else than is wanted.
    """
    path = folder.absolute() / FOLDER
    if not path.is_dir() or path.is_symlink():
        raise UserError(f"{path} is not a folder; restore it from a copy, or export again.")
    for parent, folders, files in os.walk(path):
        for name in (*folders, *files):
            inside(path, os.path.relpath(os.path.join(parent, name), path))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            there = flatten_dict(dict(checkpointer.metadata(path).item_metadata.tree), sep="/")
            check_names(path, set(there), set(wanted))
            for name, leaf in there.items():
                check_shape(path, name, tuple(leaf.shape), np.dtype(leaf.dtype).name, wanted[name])
            restored = checkpointer.restore(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes Orbax and TensorStore stumble over
        raise UserError(f"{path} is damaged ({reason_of(error)}); restore it from a copy, or export again.") from error
    return jax.tree.map(np.asarray, flatten_dict(restored, sep="/"))
