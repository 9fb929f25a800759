"""Making a data set of ArrayRecord shards: its folder, its examples' bytes, and the names and metadata TFDS reads."""

import contextlib
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
