"""Cuts a video into scenes: writes those that are kept as mp4s, and a record that lists all of them."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from walt_jax.data.beam import publish
from walt_jax.data.captioner import CaptionError, caption, open_captioner
from walt_jax.data.media import write_video_stream
from walt_jax.data.prepare_config import PrepareConfig
from walt_jax.data.raw import RawVideo
from walt_jax.data.scenes import Scene, find_scenes, frames_of, objection, rate_of
from walt_jax.data.video import ClipError

SCENES = "scenes"  # sub-folders of the work folder
RECORDS = "inputs"


def cut_one(line: str, config: PrepareConfig, work: str) -> None:
    """Writes the kept scenes of a video, then its record, which marks the video as done.

    Args:
        line: a `RawVideo` as JSON.
        config: see `PrepareConfig`.
        work: the work folder, local or remote, which gets `scenes/` and `inputs/`.
    """
    work, fields = epath.Path(work), json.loads(line)
    video = RawVideo(fields["name"], fields["uri"], tuple(fields["captions"]))
    record = {"input": video.name, "reason": None, "dropped_by": None, "scenes": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            _cut_into(record, video, config, work, Path(folder))
    except ClipError as error:  # scenes written so far are in no record, so they get into no shard
        record.update(reason=str(error), dropped_by="unreadable", scenes=[])
    if record["reason"] is None and not any(scene["kept"] for scene in record["scenes"]):
        record.update(reason="none of its scenes is kept", dropped_by="scenes")
    publish(work / RECORDS / f"{video.key}.json", json.dumps(record, ensure_ascii=False), work)


def _cut_into(record: dict[str, Any], video: RawVideo, config: PrepareConfig, work: epath.Path, folder: Path) -> None:
    """Fills in the record. A ClipError is always about the video."""
    path = _fetch(video.uri, folder)
    record["size_bytes"] = path.stat().length
    height, width, _ = next(frames_of(path)).shape
    record.update(height=height, width=width)
    if min(height, width) < config.min_short_side:
        reason = f"{height} × {width} pixels, the shorter fewer than min_short_side={config.min_short_side}"
        return record.update(reason=reason, dropped_by="size")
    fps = rate_of(path) if config.fps is None else Fraction(config.fps).limit_denominator(1001)
    record["frames_per_second"] = float(fps)
    scenes = find_scenes(path, fps, config.cut_threshold, config.max_seconds)
    record["duration_seconds"] = float(scenes[-1].end / fps)
    rows = record["scenes"] = [_row(video, index, scene, fps) for index, scene in enumerate(scenes)]
    for row, scene in zip(rows, scenes, strict=True):
        row["dropped_by"], row["reason"] = objection(scene, fps, config) or (None, None)
    shrunk = config.short_side is not None and config.short_side < min(height, width)
    cover = (config.short_side, config.short_side) if shrunk else None
    captioner = open_captioner(config)
    # Reads the video again, frame by frame: a film does not fit into memory.
    frames, position = None, 0
    for row, scene in zip(rows, scenes, strict=True):
        if row["reason"] is None:
            frames = frames or frames_of(path, fps, cover)
            next(itertools.islice(frames, scene.start - position, scene.start - position), None)
            length = scene.end - scene.start
            shown = _Shown(itertools.islice(frames, length), length, config.caption_frames if captioner else 0)
            file = folder / "scene.mp4"
            count, position = write_video_stream(file, shown, fps), scene.end
            if count != length:
                raise ClipError("read twice, it gives other frames")
            row.update(height=shown.height, width=shown.width, frames=count, size_bytes=file.stat().st_size)
            row["captions"] = list(video.captions)
            if captioner:
                try:
                    row["captions"] = caption(captioner, np.stack(shown.chosen), row["captions"])
                except CaptionError as error:
                    row.update(reason=str(error), dropped_by="caption")
                    continue
            publish(work / SCENES / row["file"], file, work)
        row["kept"] = row["reason"] is None


def _row(video: RawVideo, index: int, scene: Scene, fps: Fraction) -> dict[str, Any]:
    return {
        "input": video.name,
        "scene": index,
        "kept": False,
        "file": f"{video.key}-{index:06}.mp4",
        "source": video.uri,
        "start_seconds": float(scene.start / fps),
        "end_seconds": float(scene.end / fps),
        "frames_per_second": float(fps),
        "motion_per_second": round(scene.motion, 6),
        "static_fraction": round(scene.static_fraction, 6),
        "border_fraction": round(scene.border_fraction, 6),
    }


class _Shown:
    """Passes a scene's frames through; keeps their size, and `count` evenly spaced frames.

    Attributes:
        height, width: of the mp4, whose sides are even.
        chosen: the kept frames, uint8 [h, w, 3] each.
    """

    def __init__(self, frames: Iterable[np.ndarray], length: int, count: int):
        self._frames = frames
        self._wanted = set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist())
        self.chosen = []

    def __iter__(self) -> Iterator[np.ndarray]:
        for index, frame in enumerate(self._frames):
            self.height, self.width = (side + side % 2 for side in frame.shape[:2])
            if index in self._wanted:
                self.chosen.append(frame)
            yield frame


def _fetch(uri: str, folder: Path) -> epath.Path:
    """A local path to the video; remote ones are copied, since they are read several times."""
    path, local = epath.Path(uri), epath.Path(folder / "video")
    if not path.is_file():
        raise ClipError("there is no such file")
    if "://" not in uri:
        return path
    with path.open("rb") as source, local.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return local
