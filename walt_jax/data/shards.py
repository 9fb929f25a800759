"""Data sets of ArrayRecord shards in TFDS's format: the folder, serialised examples, shard names and metadata."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from walt_jax.errors import UserError
from walt_jax.workdir import OURS, locked

WORK = "work"  # sub-folder for unfinished work, removed when the data set is complete


def only_writer(out: epath.Path, flag: str) -> contextlib.AbstractContextManager[None]:
    """Refuses a second writer of a local folder, see `workdir.locked`.

    Remote folders have no lock. Two writers of the same data set write equal files atomically; the slower one may fail
    when the other removes `work`, and can be started again.
    """
    return contextlib.nullcontext() if "://" in str(out) else locked(Path(out), flag)


def check_new(out: epath.Path) -> None:
    """Checks that a folder is empty, apart from files of a process that was killed right after its start.

    Raises:
        UserError: if it is not.
    """

    def ours(path: epath.Path) -> bool:
        if path.name == WORK:  # has only hidden temporary files of `publish`
            return path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())
        return path.name in OURS

    strangers = sorted(path.name for path in out.iterdir() if not ours(path)) if out.exists() else []
    if strangers:
        raise UserError(f"{out} holds {strangers[0]} and no data set that was begun; choose an empty folder.")


def serialize(features: Any, example: Mapping[str, Any]) -> bytes:
    """An example's bytes, equal in every process.

    Args:
        features: a TFDS `FeaturesDict`.
        example: a value for each feature.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example.FromString(features.serialize_example(example))
    # By default, protobuf serialises a map in an order that differs between processes.
    return proto.SerializeToString(deterministic=True)


def template(out: epath.Path, dataset: str, split: str) -> Any:
    """TFDS's template for the names of the shards in a folder."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )


def write_metadata(
    out: epath.Path, dataset: str, split: str, features: dict[str, Any], lengths: Sequence[int], num_bytes: int
) -> None:
    """Writes TFDS's metadata of a data set with one split.

    Args:
        out: the folder of the shards.
        dataset: name of the data set.
        split: name of the split.
        features: TFDS's features of an example.
        lengths: number of examples of each shard.
        num_bytes: total size.
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
    """Opens a data set with TFDS; checks its metadata and the number of examples in each shard.

    Args:
        path: its folder.
        remedy: what to do about a damaged data set, for the error message.

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
    except Exception as error:  # damaged files raise many kinds in TFDS and protobuf
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
        found = reader.num_records()  # 0 if the file is truncated or no ArrayRecord
        reader.close()
    except Exception:  # errors of opening are raised by `close`
        found = 0
    if found != length:
        raise UserError(f"{file} is damaged, it holds {found} of {length} examples: {remedy}.")


def read_object(file: epath.Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

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
    """The first line of an error's message, at most 120 characters; its type if there is no message."""
    return (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
