"""Data sets of latents: encoded clips with captions in ArrayRecord shards, which TFDS reads too."""

import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from walt_jax.data.beam import publish
from walt_jax.data.shards import (
    WORK,
    check_new,
    only_writer,
    open_data_set,
    read_object,
    serialize,
    short_reason,
    template,
    write_metadata,
)
from walt_jax.errors import UserError
from walt_jax.local_copy import local_copy
from walt_jax.parallel.processes import exchanged, one_after_the_first, place
from walt_jax.remote import check_reachable, is_remote

DATASET, SPLIT = "latents", "train"
REPORT, SIZES, EMPTY = "encode.json", "sizes.npy", "empty.npy"
CLIPS_PER_SHARD = 512
REMEDY = "restore it from a copy, or remove the folder and make it with --mode=encode"


class Encoded(NamedTuple):
    """An encoded clip.

    Attributes:
        latents: float32, normalised.
        caption: "" if there is none.
        embeddings: of the caption's tokens, if a frozen text encoder is used.
        low_res: the low-resolution latents that a super-resolution stage reads.
    """

    latents: Float[np.ndarray, "t h w c"]
    caption: str
    embeddings: Float[np.ndarray, "n e"] | None = None
    low_res: Float[np.ndarray, "t h2 w2 c"] | None = None


def write_latents(
    out: epath.PathLike,
    identity: dict[str, Any],
    count: int,
    encoded: Callable[[range], Iterable[Encoded]],
    empty: Callable[[], Float[np.ndarray, "n e"]] | None = None,
    notes: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Writes a data set shard by shard. Resumes an incomplete one; leaves a complete one as it is.

    Of several processes, which all call it, each makes its part of the shards.

    Args:
        out: the folder, local or remote. It gets the shards, TFDS's metadata, `sizes.npy`, with embeddings
            `empty.npy`, and, last, `encode.json`.
        identity: all that the latents depend on (JSON); a folder with another identity is refused. With "low_res" in
            it, clips have low-resolution latents.
        count: number of clips to try.
        encoded: encodes the clips of a range of the numbers 0 … count - 1, in order, without the unusable ones.
        empty: computes the embeddings of the empty caption, if clips have embeddings.
        notes: text files by name, written before the first shard.

    Returns:
        What `encode.json` holds: {"identity", "clips", "latents_bytes"}.

    Raises:
        UserError: if the folder holds something else, another process is writing to it, or no clip is usable.
    """
    check_reachable(out)
    out, identity = epath.Path(out), {**identity, "count": count}
    if exchanged((out / REPORT).exists())[0]:  # complete; the folder need not be writable
        _check_same(out, identity)
        return _read_report(out / REPORT)
    with only_writer(out, "--out"):
        with one_after_the_first() as first:
            if first:
                _check_same(out, identity)
        if exchanged((out / REPORT).exists())[0]:  # another command has completed it meanwhile
            return _read_report(out / REPORT)
        with one_after_the_first() as first:
            if first:
                _begin(out, identity, notes)
        _write_shards(out, identity, count, encoded, empty)
        with one_after_the_first() as first:
            if first:
                _complete(out, identity, count, empty)
        return _read_report(out / REPORT)


def _begin(out: epath.Path, identity: dict[str, Any], notes: Mapping[str, str]) -> None:
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    publish(work / REPORT, json.dumps({"identity": identity}), work)
    for name, text in notes.items():
        publish(out / name, text, work)


def _done(out: epath.Path, count: int) -> list[epath.Path]:
    """Of each shard the file that is written after it: the sizes of its clips."""
    return [out / WORK / f"{shard:05}.npy" for shard in range(math.ceil(count / CLIPS_PER_SHARD))]


def _write_shards(
    out: epath.Path,
    identity: dict[str, Any],
    count: int,
    encoded: Callable[[range], Iterable[Encoded]],
    empty: Callable[[], Float[np.ndarray, "n e"]] | None,
) -> None:
    """Writes this process's shards; the processes wait for each other."""
    work, files = out / WORK, _done(out, count)
    shards, (index, processes) = len(files), place()
    without = None if empty is None else empty()
    for shard in range(index, shards, processes):
        if not files[shard].exists():
            numbers = range(shard * CLIPS_PER_SHARD, min(count, (shard + 1) * CLIPS_PER_SHARD))
            clips = list(encoded(numbers))
            _write_shard(
                out / template(out, DATASET, SPLIT).sharded_filepath(shard_index=shard, num_shards=shards).name,
                clips,
                "low_res" in identity,
                without,
                work,
            )
            sizes = np.array([clip.latents.shape for clip in clips], np.int32).reshape(-1, 4)
            publish(files[shard], _npy(sizes), work)
    exchanged(None)


def _complete(
    out: epath.Path, identity: dict[str, Any], count: int, empty: Callable[[], Float[np.ndarray, "n e"]] | None
) -> None:
    """Writes what all shards have together."""
    work, without = out / WORK, None if empty is None else empty()
    sizes = [np.load(io.BytesIO(done.read_bytes())) for done in _done(out, count)]
    every = np.concatenate(sizes)
    if not len(every):
        raise UserError(f"None of the {count} clips for {out} could be encoded; --mode=data says why.")
    kinds = _features(int(every[0, 3]), "low_res" in identity, without)
    write_metadata(out, DATASET, SPLIT, kinds, [len(shard) for shard in sizes], num_bytes=0)
    if without is not None:
        publish(out / EMPTY, _npy(without.astype(np.float32)), work)
    publish(out / SIZES, _npy(every[:, :3]), work)
    report = {
        "identity": identity,
        "clips": len(every),
        "latents_bytes": int(4 * every.prod(-1, dtype=np.int64).sum()),
    }
    publish(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n", work)
    work.rmtree()


class LatentClips:
    """The clips of a data set written by `write_latents`.

    Args:
        path: its folder; a remote one is copied to this machine first, see `local_copy`.
        cache_bytes: maximum size of the cache.
        tokenizer: digest of the expected tokenizer; None accepts any.
        text: digest of the expected text encoder; None if embeddings are not read.
        low_res: digest of the expected base tokenizer; None if low-resolution latents are not read.

    Attributes:
        sizes: (t, h, w) of each clip's latents.
        empty: embeddings of the empty caption, if clips have embeddings.

    Raises:
        UserError: if the folder holds no complete data set, or one of another tokenizer or text encoder.
    """

    sizes: Int[np.ndarray, "n 3"]
    empty: Float[np.ndarray, "n e"] | None

    def __init__(
        self,
        path: epath.PathLike,
        cache_bytes: int = 2**30,
        tokenizer: str | None = None,
        text: str | None = None,
        low_res: str | None = None,
    ):
        check_reachable(path)
        path = epath.Path(path)
        if not (path / REPORT).exists():
            raise UserError(f"{path} holds no complete data set of latents; make it with --mode=encode.")
        report = _read_report(path / REPORT)
        here = local_copy(path, json.dumps(report)) if is_remote(path) else path
        builder = open_data_set(here, REMEDY)
        self.sizes = _load(here / SIZES)
        self.empty = None
        try:
            self._records = _records(builder)
            if self.sizes.shape != (len(self._records), 3):
                raise ValueError(f"{SIZES} has the shape {self.sizes.shape} for {len(self._records)} clips")
            if "embeddings" in builder.info.features:
                self.empty = _load(here / EMPTY).astype(builder.info.features["embeddings"].np_dtype)
        except Exception as error:  # damaged files raise many kinds in TFDS
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({short_reason(error)}): {REMEDY}.") from error
        if tokenizer is not None and report["identity"].get("tokenizer") != tokenizer:
            raise UserError(
                f"{path} holds latents of another tokenizer than this run's; encode anew with --mode=encode, or set "
                "--config.tokenizer_from to the run that they are of."
            )
        if text is not None and report["identity"].get("text") != text:
            raise UserError(
                f"{path} holds no captions that this run's config.text has read; encode anew with --mode=encode and "
                "this config."
            )
        if low_res is not None and report["identity"].get("low_res") != low_res:
            raise UserError(
                f"{path} holds no low-resolution latents of the tokenizer that config.low_res_from names; encode anew "
                "with --mode=encode and this config."
            )
        self.path, self._room, self._kept = path, cache_bytes, {}
        self._example = _example()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Encoded:
        if index in self._kept:
            return self._kept[index]
        try:
            clip = self._decoded(self._records[index])
            if clip.latents.shape[:3] != tuple(self.sizes[index].tolist()):
                raise ValueError(f"it has latents of {clip.latents.shape}, not the size that {SIZES} has")
        except Exception as error:  # damaged shards raise many kinds in ArrayRecord and protobuf
            raise UserError(
                f"Clip {index} of {self.path} can't be read, a shard is damaged ({short_reason(error)}): {REMEDY}."
            ) from error
        size = sum(part.nbytes for part in (clip.latents, clip.embeddings, clip.low_res) if part is not None)
        if self._room >= size:
            self._room -= size
            self._kept[index] = clip
        return clip

    def _decoded(self, record: bytes) -> Encoded:
        """What `_write_shard` has written of a clip; TFDS takes ten times as long to decode it."""
        features = self._example.FromString(record).features.feature

        def array(name: str) -> np.ndarray:
            content = np.frombuffer(features[f"{name}/value"].bytes_list.value[0], np.float32)
            return content.reshape(features[f"{name}/shape"].int64_list.value)

        embeddings = None
        if self.empty is not None:
            content = np.frombuffer(features["embeddings"].bytes_list.value[0], self.empty.dtype)
            embeddings = content.reshape(-1, self.empty.shape[1])
        caption = features["caption"].bytes_list.value[0].decode()
        return Encoded(array("latents"), caption, embeddings, array("low_res") if "low_res/value" in features else None)


def _check_same(out: epath.Path, identity: dict[str, Any]) -> None:
    for report in (out / REPORT, out / WORK / REPORT):
        if report.exists():
            before = _read_report(report)["identity"]
            for name in {**before, **identity}:
                if before.get(name) != identity.get(name):
                    raise UserError(
                        f"{out} holds latents whose {name} is {before.get(name)!r}, not {identity.get(name)!r}; choose "
                        "another folder, or remove this one."
                    )
            return
    check_new(out)


def _read_report(path: epath.Path) -> dict[str, Any]:
    """The content of `encode.json`.

    Raises:
        UserError: if it is damaged.
    """
    report = read_object(path, REMEDY)
    if not isinstance(report.get("identity"), dict):
        raise UserError(f"{path} is damaged (it has no identity): {REMEDY}.")
    return report


def _records(builder: Any) -> Any:
    """The bytes of a data set's examples, by index."""
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(SPLIT, deserialize_method=raw)


def _example() -> Any:
    """The message that an example is; protobuf's classes are imported where they are used, as they take a second."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _load(path: epath.Path) -> np.ndarray:
    try:
        return np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or not there ({short_reason(error)}): {REMEDY}.") from error


def _features(channels: int | None, low_res: bool, empty: Float[np.ndarray, "n e"] | None) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    kinds = {
        # TFDS supports several unknown dimensions only with an encoding.
        "latents": tfds.features.Tensor(
            shape=(None, None, None, channels),
            dtype=np.float32,
            encoding="bytes",
            doc="(time, height, width, channels), normalised.",
        ),
        "caption": tfds.features.Text(doc="Empty where there is none."),
    }
    if low_res:
        kinds["low_res"] = tfds.features.Tensor(
            shape=(None, None, None, channels), dtype=np.float32, encoding="bytes", doc="As latents, of a smaller clip."
        )
    if empty is not None:
        kinds["embeddings"] = tfds.features.Tensor(
            shape=(None, empty.shape[1]), dtype=empty.dtype, encoding="bytes", doc="Of the caption's tokens."
        )
    return kinds


def _write_shard(
    path: epath.Path, clips: list[Encoded], low_res: bool, empty: Float[np.ndarray, "n e"] | None, work: epath.Path
) -> None:
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    kinds = tfds.features.FeaturesDict(_features(clips[0].latents.shape[-1] if clips else None, low_res, empty))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shard"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")  # each can be read by itself
        for clip in clips:
            writer.write(serialize(kinds, {name: clip._asdict()[name] for name in kinds}))
        writer.close()
        publish(path, file, work)


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()
