"""Writes sampled videos to files, with what they were asked for."""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from walt_jax.data.media import contact_sheet, write_video, write_video_stream
from walt_jax.generation import provenance
from walt_jax.generation.content_credentials import Sign
from walt_jax.generation.long_video import Segment
from walt_jax.parallel.processes import is_first
from walt_jax.workdir import write_atomically, write_picture

SHEET_FRAMES = 16  # frames of a long video that its sheet is chosen from


class Samples:
    """A folder of sampled videos: their files, `samples.json`, which grows with them, and `contact_sheet.png`.

    Of several processes the first writes. Other files of the folder are kept.

    Args:
        out: the folder; it is created if it does not exist.
        fps: frames a second.
        suffixes: file formats, ".mp4" or ".gif"; `samples.json` names the files of the first one.
        settings: what all videos were asked for, beside prompt and seed; in `samples.json` and in the files' tags.
        tags: whether files have tags.
        made_by: the models, for the file that stands beside each video, see `provenance`; None leaves it out.
        sign: signs each file, see `content_credentials`; None leaves them unsigned.
    """

    def __init__(
        self,
        out: pathlib.Path,
        fps: float,
        suffixes: Sequence[str] = (".mp4",),
        settings: Mapping[str, Any] | None = None,
        tags: bool = True,
        made_by: Mapping[str, Any] | None = None,
        sign: Sign | None = None,
    ):
        self._made_by, self._sign = made_by, sign
        self.out, self._fps, self._suffixes, self._tags = out, fps, suffixes, tags
        self._settings = dict(settings or {})
        self.rows: list[dict[str, Any]] = []
        self._shown: list[UInt8[np.ndarray, "t h w 3"]] = []
        if is_first():
            out.mkdir(parents=True, exist_ok=True)

    def add(self, clip: UInt8[np.ndarray, "t h w 3"], prompt: str, seed: int, **own: Any) -> None:
        """Writes a video; `own` are its settings."""
        name, row = self._row(prompt, seed, clip.shape[:3], own)
        for suffix in self._suffixes if is_first() else ():
            write_video(self.out / f"{name}{suffix}", clip, self._fps, self._tags_of(row))
        self._end(row, clip)

    def add_stream(
        self,
        frames: Iterable[UInt8[np.ndarray, "h w 3"]],
        size: tuple[int, int, int],
        prompt: str,
        seed: int,
        **own: Any,
    ) -> None:
        """Writes a video while its frames are made.

        If that ends early, the file has those that were, and its row says that it is not complete; where none was,
        there is neither.
        """
        name, row = self._row(prompt, seed, size, own)
        shown: list[np.ndarray] = []
        made = 0

        def watched() -> Iterator[np.ndarray]:
            nonlocal made
            for number, frame in enumerate(frames):
                if number % max(1, size[0] // SHEET_FRAMES) == 0:
                    shown.append(frame)
                made = number + 1
                yield frame

        try:
            if is_first():
                write_video_stream(self.out / f"{name}.mp4", watched(), self._fps, self._tags_of(row), keeps_part=True)
            else:
                for _ in watched():
                    pass
        except BaseException:
            if made == size[0]:  # a signal came while the file was ended
                self._end(row, np.stack(shown))
            elif made:
                self._end({**row, "num_frames": made, "complete": False}, np.stack(shown))
            raise
        self._end(row, np.stack(shown))

    def name(self, prompt: str, seed: int) -> str:
        """Of the next video's files."""
        return f"{len(self.rows):03d}_{slug(prompt)}_seed{seed}"

    def _row(self, prompt: str, seed: int, size: tuple[int, ...], own: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        name, (frames, height, width) = self.name(prompt, seed), size
        row = {"file": f"{name}{self._suffixes[0]}", "prompt": prompt, "seed": int(seed)}
        return name, {**row, "num_frames": frames, "height": height, "width": width, **self._settings, **own}

    def _tags_of(self, row: Mapping[str, Any]) -> dict[str, str]:
        if not self._tags:
            return {}
        return provenance.tags(row["prompt"], self._made(row))

    def _made(self, row: Mapping[str, Any]) -> dict[str, Any]:
        settings = {name: value for name, value in row.items() if name != "file"}
        return provenance.made({**(self._made_by or {}), **settings})

    def _end(self, row: dict[str, Any], clip: UInt8[np.ndarray, "t h w 3"]) -> None:
        self.rows.append(row)
        if self._sign is not None and is_first():
            for suffix in self._suffixes:
                self._sign((self.out / row["file"]).with_suffix(suffix), self._made(row))
        if self._made_by is not None and is_first():
            video = self.out / row["file"]
            provenance.write_sidecar(video.with_suffix(".json"), video, self._made(row))
        self._shown.append(clip)
        write_atomically(self.out / "samples.json", json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")

    def sheet(self) -> None:
        """Writes the contact sheet."""
        write_picture(self.out / "contact_sheet.png", contact_sheet(self._shown, [row["prompt"] for row in self.rows]))


def write_samples(
    out: pathlib.Path,
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    fps: float,
) -> list[dict[str, Any]]:
    """Writes videos into a folder, see `Samples`.

    Returns:
        What `samples.json` holds: {"file", "prompt", "seed", …} for each, files relative to `out`.
    """
    samples = Samples(out, fps)
    for clip, prompt, seed in zip(clips, prompts, seeds, strict=True):
        samples.add(clip, prompt, seed)
    samples.sheet()
    return samples.rows


def shown_frames(
    made: Iterable[Segment], shown: range, progress: Callable[[int], None]
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of a long video as they are made.

    Args:
        made: its segments.
        shown: numbers of the frames that are kept.
        progress: called with the number of frames of each segment.
    """
    number = 0
    for segment in made:
        for frame in segment.frames:
            if number in shown:
                yield frame
            number += 1
        progress(len(segment.frames))


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "unconditional"
