"""The knobs of `--mode=prepare`: what is read, which scenes are kept, and how they are written."""

import dataclasses
from typing import Annotated

from walt_jax.config import Fraction, Positive, Range

# Knobs that don't change what is written, so that a stopped run may go on with others: another runner, more workers.
FREE_KNOBS = ("runner", "runner_options")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What `--mode=prepare` reads, which scenes it keeps and how it writes them.

    Motion, static and border are measured on pictures of 144 pixels on the short side, four a second.

    Attributes:
        source: a folder of videos (sub-folders too; captions from its `metadata.csv`, where there is one, with the
            columns `file_name` and `caption`), or a text file with a path or URI a line, relative to the text file.
        cut_threshold: a cut is where the picture changes so many times more than around it (PySceneDetect's adaptive
            detector); None cuts nothing.
        min_seconds: shorter scenes are dropped.
        max_seconds: longer scenes are divided into equal pieces that are not longer.
        min_short_side: videos with a shorter side than this, in pixels, are dropped.
        min_motion, max_motion: of the optical flow, mean over the picture and the scene, in short sides a second;
            scenes outside are dropped. None: no upper limit.
        max_static_fraction: scenes are dropped in which, for a greater share of their time, nothing changes.
        max_border_fraction: scenes are dropped of which a greater share of the picture is a black border throughout.
        fps: frames a second of what is written; None keeps each video's own.
        short_side: in pixels; larger videos are shrunk to it. None keeps their size.
        captioner: `module:function`, called with the frames, uint8 [t, h, w, 3], and the captions so far, a list of
            str; it returns a caption or a list of them, which takes their place. "" keeps the captions as they are.
        caption_command: the same as a command, which is run with one more argument, a folder in which the frames lie as
            `000.png`, `001.png`, …; it prints a caption a line.
        caption_frames: how many frames of a scene either gets, spread evenly.
        shard_bytes: of video in a file of the data set, about.
        runner: a runner of Apache Beam, such as DirectRunner (this machine), DataflowRunner, FlinkRunner, SparkRunner.
        runner_options: its flags, such as `--project=NAME`. DirectRunner works in a thread a core, unless
            `--direct_num_workers=N` or `--direct_running_mode=multi_processing` say otherwise.
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
        # Halves of a scene just over max_seconds must be long enough, or dividing would lose what it divides.
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
