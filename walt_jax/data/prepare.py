"""Makes a data set of scenes from raw video: ArrayRecord shards that TFDS reads, with any runner of Apache Beam.

For each video its scenes are written first, then a record that lists them. Videos with a record are done: a stopped run
resumes with the others. The order of scenes in shards depends on the records only, and all files are written
atomically. So each scene is in the data set once, however often work was stopped or repeated, and the same videos give
the same shards.
"""

import collections
import dataclasses
import functools
import json
import logging
import tempfile
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from walt_jax.data.beam import publish, run_each
from walt_jax.data.captioner import open_captioner
from walt_jax.data.cutting import RECORDS, SCENES, cut_one
from walt_jax.data.prepare_config import FREE_KNOBS, PrepareConfig
from walt_jax.data.raw import RawVideo, list_raw
from walt_jax.data.shards import WORK, check_new, only_writer, serialize, template, write_metadata
from walt_jax.errors import UserError
from walt_jax.remote import check_reachable
from walt_jax.workdir import CONFIG, flatten, read_config

DATASET = "scenes"
SPLIT = "train"
REPORT = "prepare.json"
READ_THREADS = 16  # for small files; hides the latency of a remote disk


def prepare(config: PrepareConfig, out: epath.PathLike) -> str:
    """Makes the data set of the config's videos; resumes an incomplete one.

    Args:
        config: see `PrepareConfig`.
        out: the folder of the data set, local or remote. It gets the shards, TFDS's metadata and `prepare.json`.

    Returns:
        A summary, one sentence.

    Raises:
        UserError: a package is missing, the source can't be listed, the folder holds something else, another process is
            writing to it, no scene is kept, or the pipeline fails.
    """
    _check_installed()
    out = epath.Path(out)
    for path in (config.source, out):
        check_reachable(path)
    with only_writer(out, "--workdir"):
        return _prepare(config, out)


def features() -> dict[str, Any]:
    """TFDS's features of an example, with their documentation.

    `video` is an mp4 (H.264, upright, no sound) of `frames` frames of `height` × `width` pixels at `fps` frames per
    second, cut from `source` between `start_seconds` and `end_seconds`; `captions` may be empty.
    """
    import tensorflow_datasets as tfds

    def number(kind: type, doc: str) -> Any:
        return tfds.features.Scalar(dtype=kind, doc=doc)

    return {
        "video": tfds.features.Text(doc="An encoded mp4."),
        "captions": tfds.features.Sequence(tfds.features.Text(), doc="Of the scene, or of the video it is from."),
        "source": tfds.features.Text(doc="Path or URI of the video that the scene is from."),
        "start_seconds": number(np.float64, "Of the scene in its source."),
        "end_seconds": number(np.float64, "Of the scene in its source."),
        "fps": number(np.float64, "Frames a second."),
        "frames": number(np.int64, "How many."),
        "height": number(np.int64, "In pixels."),
        "width": number(np.int64, "In pixels."),
    }


def _check_installed() -> None:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam's import warns about missing optional packages
    try:
        import apache_beam  # noqa: F401
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'--mode=prepare needs the package {error.name}; run pip install -e ".[prepare]" in the repository.'
        ) from error
    finally:
        logging.disable(level)


def _prepare(config: PrepareConfig, out: epath.Path) -> str:
    knobs = json.loads(json.dumps({"prepare": dataclasses.asdict(config)}))
    before = read_config(out)
    if before is not None:
        _check_same(out, before, knobs)
    else:
        check_new(out)
    open_captioner(config)  # raises here rather than in every worker
    videos, again = list_raw(config.source)
    work = out / WORK
    if (out / REPORT).exists():
        report = json.loads((out / REPORT).read_text())
        _check_complete(out, report, videos)
    else:
        publish(out / CONFIG, json.dumps(knobs, indent=1) + "\n", work)
        records = _cut(config, videos, work)
        scenes = [scene for record in records for scene in record["scenes"] if scene["kept"]]
        shards = _divide(sorted(scenes, key=lambda scene: scene["file"]), config.shard_bytes)
        _write_shards(config, shards, out)
        if shards:
            size = sum(scene["size_bytes"] for shard in shards for scene in shard)
            write_metadata(out, DATASET, SPLIT, features(), [len(shard) for shard in shards], size)
        report = _report(config, records, again, shards)
        publish(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n", work)
    if work.exists():
        work.rmtree()
    if not report["scenes_kept"]:
        raise UserError(
            f"No scene of {config.source} was kept; {out / REPORT} says why. Change what drops them, and choose "
            "another --workdir."
        )
    return (
        f"wrote {report['scenes_kept']} scenes ({report['scenes_kept_seconds']:.0f} s, {report['data_set_bytes']:,} "
        f"bytes) of {report['inputs_kept']} videos in {report['shards']} shards to {out}; {report['inputs_dropped']} "
        f"videos and {report['scenes_dropped']} scenes were dropped, {REPORT} says why"
    )


def _check_same(out: epath.Path, before: dict[str, Any], knobs: dict[str, Any]) -> None:
    old, new = flatten(before), flatten(knobs)
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and name.rsplit(".", 1)[-1] not in FREE_KNOBS:
            raise UserError(
                f"{out} was begun with config.{name}={old.get(name)!r}, not {new.get(name)!r}; choose another "
                "--workdir, or the config it was begun with."
            )


def _check_complete(out: epath.Path, report: dict[str, Any], videos: list[RawVideo]) -> None:
    """Refuses another listing of the source: the names of shards contain their number, so none can be added."""
    old, new = {row["input"] for row in report["inputs"]}, {video.name for video in videos}
    if old != new:
        raise UserError(
            f"{out} is a complete data set, but {sorted(old ^ new)[0]} is new in the source or gone from it; prepare "
            "into another --workdir."
        )


# Videos to scenes


def _cut(config: PrepareConfig, videos: list[RawVideo], work: epath.Path) -> list[dict[str, Any]]:
    """Cuts the videos that have no record; returns all records, in the order of `videos`."""
    folder = work / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    done = {path.name for path in folder.iterdir()}
    todo = [dataclasses.asdict(video) for video in videos if f"{video.key}.json" not in done]
    run_each(
        config, work, "input", todo, functools.partial(cut_one, config=config, work=str(work)), folder, len(videos)
    )
    with futures.ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda video: json.loads((folder / f"{video.key}.json").read_text()), videos))


# Scenes to shards


def _divide(scenes: list[dict[str, Any]], shard_bytes: int) -> list[list[dict[str, Any]]]:
    """Divides scenes, in order, into non-empty lists of about `shard_bytes` of video, one for each shard."""
    shards, size = [], 0
    for scene in scenes:
        if not shards or size + scene["size_bytes"] > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(scene)
        size += scene["size_bytes"]
    return shards


def _write_shards(config: PrepareConfig, shards: list[list[dict[str, Any]]], out: epath.Path) -> None:
    work = out / WORK
    plan = work / "plan.json"
    wanted = json.dumps([[scene["file"] for scene in shard] for shard in shards])
    if not plan.exists() or plan.read_text() != wanted:  # they may be of another listing of the source
        for path in out.glob(f"{DATASET}-{SPLIT}.array_record-*"):
            path.unlink()
        publish(plan, wanted, work)
    names = [
        template(out, DATASET, SPLIT).sharded_filepath(shard_index=i, num_shards=len(shards)).name
        for i in range(len(shards))
    ]
    there = {path.name for path in out.iterdir()}
    todo = [{"name": name, "scenes": shard} for name, shard in zip(names, shards, strict=True) if name not in there]
    run_each(
        config, work, "shard", todo, functools.partial(_write_shard, out=str(out)), out, len(shards), ".array_record-"
    )


def _write_shard(line: str, out: str) -> None:
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    out, shard = epath.Path(out), json.loads(line)
    kinds = tfds.features.FeaturesDict(features())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shard"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")  # as TFDS: single examples are read
        for scene in shard["scenes"]:
            example = {name: scene[name] for name in kinds if name in scene}
            video = (out / WORK / SCENES / scene["file"]).read_bytes()
            example.update(video=video, fps=scene["frames_per_second"])
            writer.write(serialize(kinds, example))
        writer.close()
        publish(out / shard["name"], file, out / WORK)


def _report(config: PrepareConfig, records: list[dict], again: list[str], shards: list[list[dict]]) -> dict[str, Any]:
    """The content of `prepare.json`: totals, then a row for every input and for every scene."""
    shard_of = {scene["file"]: index for index, shard in enumerate(shards) for scene in shard}
    inputs = [{**record, "scenes": len(record["scenes"])} for record in records]
    inputs += [{"input": name, "reason": "listed again", "dropped_by": "duplicate", "scenes": 0} for name in again]
    scenes = [
        {**{key: value for key, value in scene.items() if key != "file"}, "shard": shard_of.get(scene["file"])}
        for record in records
        for scene in record["scenes"]
    ]
    kept = [scene for scene in scenes if scene["kept"]]
    dropped = collections.Counter(row["dropped_by"] for row in (*inputs, *scenes) if row["dropped_by"])
    return {
        "source": config.source,
        "inputs_kept": sum(row["reason"] is None for row in inputs),
        "inputs_dropped": sum(row["reason"] is not None for row in inputs),
        "scenes_kept": len(kept),
        "scenes_dropped": len(scenes) - len(kept),
        "scenes_kept_seconds": sum(scene["end_seconds"] - scene["start_seconds"] for scene in kept),
        "shards": len(shards),
        "data_set_bytes": sum(scene["size_bytes"] for scene in kept),
        "dropped_by": dict(sorted(dropped.items())),
        "inputs": inputs,
        "scenes": scenes,
    }
