"""What TFDS wants to know of a data set of ArrayRecord shards: their names, and the metadata beside them."""

from collections.abc import Sequence
from typing import Any

from etils import epath


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
