"""A data set in TFDS's ArrayRecord format as a store of clips, read without TensorFlow."""

from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds

from walt_jax.data.folder import SPLIT_COLUMN
from walt_jax.data.limits import ClipError
from walt_jax.data.shards import open_data_set, short_reason
from walt_jax.data.store import Row, Store
from walt_jax.data.video import ClipInfo
from walt_jax.errors import UserError

REMEDY = "restore it from a copy, or prepare the data set anew"


class Records(Store):
    """The clips of a data set written by `--mode=prepare` or TFDS: one encoded video or image per example.

    Features of an example: `video` or `image`, encoded; caption features, texts or class labels, or else `captions`, a
    list of texts of equal weight; optionally `source`, the video that it was cut from, which is held out as a whole. If
    the data set has several splits, they are used. Opening the data set checks every example, in several threads.
    """

    def _open(self, captions: Mapping[str, float], max_bad_fraction: float) -> None:
        builder = open_data_set(self.path, REMEDY)
        try:
            encoded = {name: tfds.decode.SkipDecoding() for name in ("video", "image") if name in builder.info.features}
            if not encoded:
                raise UserError(
                    f"{self.path} has neither a feature video nor image; it has {', '.join(builder.info.features)}."
                )
            self._feature = next(iter(encoded))
            self._labels = {name: builder.info.features[name] for name in captions if name in builder.info.features}
            plain = isinstance(builder.info.features[self._feature], tfds.features.Text)
            self._examples = {
                split: builder.as_data_source(split, decoders=None if plain else encoded)
                for split in builder.info.splits
            }
        except (ValueError, OSError, ImportError) as error:
            raise UserError(f"{self.path} can't be read as an ArrayRecord data set ({error}): {REMEDY}.") from error
        self._read(captions, max_bad_fraction)

    def content(self, file: str) -> bytes:
        try:
            content = self._example(file)[self._feature]
            if not isinstance(content, bytes):
                raise ValueError("an example is empty")
            return content
        except Exception as error:  # damaged shards raise many kinds in ArrayRecord and protobuf
            raise ClipError(f"a shard is damaged: {short_reason(error)}") from error

    def is_gone(self, file: str) -> bool:
        try:
            self.content(file)
        except ClipError:
            return True
        return False

    def _example(self, file: str) -> Mapping[str, Any]:
        split, number = file.rsplit("/", 1)
        return self._examples[split][int(number)]

    def _read(self, captions: Mapping[str, float], max_bad_fraction: float) -> None:
        """Checks all examples; sets `rows` and `info`."""
        files = [f"{split}/{number}" for split, examples in self._examples.items() for number in range(len(examples))]

        def check(file: str) -> tuple[Row, ClipInfo | str]:
            split = file.rsplit("/", 1)[0]
            try:
                example = self._example(file)
            except Exception as error:  # as in `content`
                return Row(file), f"a shard is damaged: {short_reason(error)}"
            part = SPLIT_COLUMN.get(split.lower(), "train") if len(self._examples) > 1 else None
            row = Row(file, self._captions(example, captions), part, _text(example.get("source", b"")))
            return row, self.look(example[self._feature])

        found = self.check_all(check, files, "clip")
        self.keep({file: info for file, (_, info) in found.items()}, max_bad_fraction, "examples", REMEDY)
        self.rows = [row for file, (row, _) in found.items() if file in self.info]

    def _captions(self, example: Mapping[str, Any], columns: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        found = []
        for name, weight in columns.items():
            if name in example:
                label = self._labels[name]
                value = example[name]
                text = label.int2str(int(value)) if isinstance(label, tfds.features.ClassLabel) else _text(value)
                found.append((text, weight))
        if not found:
            found = [(_text(caption), 1.0) for caption in example.get("captions", ())]
        return tuple((text, weight) for text, weight in found if text)


def _text(value: bytes | str) -> str:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
