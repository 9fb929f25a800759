"""Safetensors: one file, or shards of at most 5 GB with an index, as the Hugging Face hub has them."""

import json
import pathlib

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from walt_jax.errors import UserError
from walt_jax.export.contents import Tensors, read_json
from walt_jax.export.untrusted import Shapes, check_names, check_shape, inside
from walt_jax.workdir import write_atomically

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def write(folder: pathlib.Path, tensors: Tensors) -> list[str]:
    """Writes parameters; returns the names of the files."""
    shards: list[Tensors] = [{}]
    for name in sorted(tensors):
        filled = sum(tensor.nbytes for tensor in shards[-1].values())
        if shards[-1] and filled + tensors[name].nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensors[name]
    if len(shards) == 1:
        save(folder / FILE, tensors)
        return [FILE]
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return [INDEX, *files]


def save(path: pathlib.Path, tensors: Tensors, framework: str = "np") -> None:
    """Writes a file, readable as other new files are: safetensors makes it its owner's only."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, {"format": framework})
    path.chmod(mode)


def read(folder: pathlib.Path, wanted: Shapes) -> Tensors:
    """Reads parameters. Names, shapes and types are compared with the config's before a tensor is read.

    Raises:
        UserError: if a file is missing, damaged or leads out of the folder, or holds something else than is wanted.
    """
    found: Tensors = {}
    for file, names in _files(folder, wanted).items():
        path = inside(folder, file)
        try:
            with safe_open(path, framework="numpy") as opened:
                check_names(path, set(opened.keys()), names)
                for name in names:
                    part = opened.get_slice(name)
                    check_shape(path, name, tuple(part.get_shape()), part.get_dtype(), wanted[name])
                found |= {name: opened.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it from a copy, or export again.") from error
    return found


def _files(folder: pathlib.Path, wanted: Shapes) -> dict[str, set[str]]:
    """The names of the parameters in each file."""
    if not (folder / INDEX).exists():
        return {FILE: set(wanted)}
    path = inside(folder, INDEX)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path} has no weight_map of names and files; restore it from a copy.")
    check_names(path, set(places), set(wanted))
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        files.setdefault(file, set()).add(name)
    return files
