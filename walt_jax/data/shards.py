"""Making a data set of ArrayRecord shards: its folder, its examples' bytes, and the names and metadata TFDS reads."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from walt_jax.errors import UserError
from walt_jax.workdir import OURS, locked

WORK = "work"  # in the output folder until the data set is complete


def only_writer(out: epath.Path, flag: str) -> contextlib.AbstractContextManager[None]:
    """Refuses a second writer of a local folder, see `workdir.locked`.

    A remote folder has no lock: two writers of the same data set write equal files, each whole, and the one that ends
    later may fail when the other removes the unfinished work; the same command then goes on.
    """
    return contextlib.nullcontext() if "://" in str(out) else locked(Path(out), flag)


def check_new(out: epath.Path) -> None:
    """Checks that a folder is empty, except for what a process killed at the beginning leaves.

    Raises:
        UserError: if it holds anything else.
    """

    def ours(path: epath.Path) -> bool:
        if path.name == WORK:  # `publish` writes hidden files there before it renames them
            return path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())
        return path.name in OURS

    strangers = sorted(path.name for path in out.iterdir() if not ours(path)) if out.exists() else []
    if strangers:
        raise UserError(f"{out} holds {strangers[0]} and no data set that was begun; choose an empty folder.")


def serialize(features: Any, example: Mapping[str, Any]) -> bytes:
    """An example's bytes: the same in each process.

    Args:
        features: a TFDS `FeaturesDict`.
        example: a value for each feature.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example.FromString(features.serialize_example(example))
    # An example is a map, whose order is otherwise another one in each process.
    return proto.SerializeToString(deterministic=True)


def template(out: epath.Path, dataset: str, split: str) -> Any:
    """TFDS's template of the shards' names in a folder."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )


def write_metadata(
    out: epath.Path, dataset: str, split: str, features: dict[str, Any], lengths: Sequence[int], num_bytes: int
) -> None:
    """Writes the metadata of a data set of one split.

    Args:
        out: the folder of its shards.
        dataset: its name.
        split: the split's.
        features: what an example holds, as TFDS features.
        lengths: examples of each shard.
        num_bytes: of all.
    """
    import tensorflow_datasets as tfds

    names = template(out, dataset, split)
    info = tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=num_bytes, filename_template=names)
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features,
        split_infos=[info],
        filename_template=names,
        check_data=False,  # it would read the shards with TensorFlow
    )


def open_data_set(path: epath.Path, remedy: str) -> Any:
    """TFDS's builder of a data set whose metadata can be read and whose shards hold what the metadata says.

    Args:
        path: its folder.
        remedy: what to do about a damaged one.

    Raises:
        UserError: if a file is damaged or missing.
    """
    import tensorflow_datasets as tfds

    for name in ("dataset_info.json", "features.json"):
        read_object(path / name, remedy)
    try:
        builder = tfds.builder_from_directory(path)
        splits = {name: (split.filepaths, split.shard_lengths) for name, split in builder.info.splits.items()}
        if not splits:
            raise ValueError("it has no split")
    except Exception as error:  # whatever a damaged file makes TFDS and protobuf stumble over
        raise UserError(
            f"{path} can't be read as an ArrayRecord data set, its dataset_info.json or features.json may be damaged "
            f"({short_reason(error)}): {remedy}."
        ) from error
    for files, lengths in splits.values():
        for file, length in zip(files, lengths, strict=True):
            _check_shard(epath.Path(file), length, remedy)
    return builder


def _check_shard(file: epath.Path, length: int, remedy: str) -> None:
    from array_record.python import array_record_module

    if not file.exists():
        raise UserError(f"{file} is not there: {remedy}.")
    try:
        reader = array_record_module.ArrayRecordReader(str(file))
        found = reader.num_records()  # 0 where the file is cut or no ArrayRecord
        reader.close()
    except Exception:  # closing a reader tells what opening it met
        found = 0
    if found != length:
        raise UserError(f"{file} is damaged, it holds {found} of {length} examples: {remedy}.")


def read_object(file: epath.Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there: {remedy}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({short_reason(error)}): {remedy}.") from error
    return found


def short_reason(error: Exception) -> str:
    """The first line of an error, at most 120 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
