"""The knobs of `--mode=prepare`: what is read, which scenes are kept, and how they are written."""

import dataclasses
from typing import Annotated

from walt_jax.config import Fraction, Positive, Range

# Knobs that don't change what is written: a stopped run may be resumed with another runner or more workers.
FREE_KNOBS = ("runner", "runner_options")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `--mode=prepare` reads, which scenes it keeps and how it writes them.

    Motion, static share and border are measured on frames resized to a short side of 144 pixels, four per second.

    Attributes:
        source: a folder of videos, searched recursively, with captions in an optional `metadata.csv` (columns
            `file_name` and `caption`); or a text file with one path or URI per line, relative to the text file.
        cut_threshold: threshold of PySceneDetect's adaptive detector: a cut is where a frame differs this many times
            more from the last one than the frames around it do. None: no cuts.
        min_seconds: minimum length of a scene; shorter ones are dropped.
        max_seconds: maximum length of a scene; longer ones are split into equal pieces.
        min_short_side: minimum short side of a video, in pixels; smaller ones are dropped.
        min_motion, max_motion: bounds on the mean length of the optical flow, over pixels and time, in short sides per
            second; other scenes are dropped. None: no upper bound.
        max_static_fraction: scenes are dropped if nothing changes for a larger share of their time, in [0, 1].
        max_border_fraction: scenes are dropped if black bars cover a larger share of the picture, in [0, 1].
        fps: frame rate of the output, in frames per second; None keeps each video's.
        short_side: short side of the output, in pixels; smaller videos keep their size. None: all do.
        captioner: `module:function`, called with the frames, uint8 [t, h, w, 3], and the current captions, a list of
            str; returns a caption or a list of them, which replace the current ones. "": captions are kept.
        caption_command: a command instead of a function. Its last argument is a folder with the frames as `000.png`,
            `001.png`, …; it prints one caption per line.
        caption_frames: how many frames of a scene the captioner gets, evenly spaced.
        shard_bytes: approximate size of a shard of the data set.
        runner: Apache Beam's runner, such as DirectRunner (this machine), DataflowRunner, FlinkRunner, SparkRunner.
        runner_options: flags of the runner, such as `--project=NAME`. DirectRunner uses one thread per core, unless
            `--direct_num_workers=N` or `--direct_running_mode=multi_processing` is set.
    """

    source: str
    cut_threshold: Annotated[float, Range(1)] | None = 3.0
    min_seconds: float = 2.0
    max_seconds: Annotated[float, Range(0.1)] = 20.0
    min_short_side: Positive = 64
    min_motion: float = 0.0
    max_motion: float | None = None
    max_static_fraction: Fraction = 0.9
    max_border_fraction: Fraction = 0.2
    fps: Annotated[float, Range(0.001, 1000)] | None = None
    short_side: Annotated[int, Range(2)] | None = None
    captioner: str = ""
    caption_command: str = ""
    caption_frames: Positive = 8
    shard_bytes: Positive = 2**28
    runner: str = "DirectRunner"
    runner_options: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.source:
            raise ValueError("source is not set; give a folder of videos or a list: --config.prepare.source=FOLDER")
        # Otherwise both halves of a scene just over max_seconds would be dropped.
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError(
                f"max_seconds={self.max_seconds:g} is less than twice min_seconds={self.min_seconds:g}, so pieces of "
                "long scenes would be too short"
            )
        if self.max_motion is not None and self.max_motion < self.min_motion:
            raise ValueError(f"max_motion={self.max_motion:g} is less than min_motion={self.min_motion:g}")
        if self.captioner and self.caption_command:
            raise ValueError("captioner and caption_command are both set; keep one")
        if self.captioner and not all(self.captioner.partition(":")):
            raise ValueError(f"captioner is {self.captioner!r}; write it as module:function")


@dataclasses.dataclass(frozen=True)
class Knobs:
    """All knobs of a config for `--mode=prepare`."""

    prepare: PrepareConfig
