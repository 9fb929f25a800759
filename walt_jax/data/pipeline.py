"""The Grain pipeline: a source's clips, shuffled, repeated, batched; its position is a JSON that checkpoints keep."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Protocol

import grain
import numpy as np

from walt_jax.config import Fraction, Positive, Range
from walt_jax.data.drawn import DrawnClips
from walt_jax.data.folder import FolderClips
from walt_jax.errors import UserError


class Source(Protocol):
    """Captioned clips by index. What is random about one comes from the generator alone."""

    captions: list[str]

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> dict | None:
        """{"video": uint8 [t, h, w, 3], "caption": str}, or None where the clip can't be used."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from and what they are made into.

    Attributes:
        source: "drawn" for the built-in shapes, or a folder of videos with a `metadata.csv`.
        frames: frames a clip.
        height, width: in pixels.
        fps: frames a second.
        caption_column: of a folder's `metadata.csv`; another one may name each clip's class.
        caption_dropout: probability that a clip is trained without its caption, for classifier-free guidance.
        cache_bytes: decoded clips of a folder are kept in memory up to this.
        max_bad_fraction: a folder with a greater share of unreadable files stops the run.
    """

    source: str
    frames: Positive
    height: Positive
    width: Positive
    fps: Annotated[float, Range(0.001, 1000)] = 8.0
    caption_column: str = "caption"
    caption_dropout: Fraction = 0.1
    cache_bytes: int = 2**30
    max_bad_fraction: Fraction = 0.0

    def __post_init__(self):
        if self.source == "drawn" and self.height != self.width:
            raise ValueError(f"drawn clips are square; height={self.height} and width={self.width} differ")


def open_source(config: DataConfig, split: str, shape: tuple[int, int, int] | None = None) -> Source:
    """Opens the config's clips.

    Args:
        config: see `DataConfig`.
        split: "train" or "held_out"; drawn clips also have "all".
        shape: (frames, height, width) of a clip, instead of the config's; 1 frame is an image.

    Raises:
        UserError: if a folder, its captions or too many of its videos can't be read.
    """
    frames, height, width = shape or (config.frames, config.height, config.width)
    if not config.source:
        raise UserError("config.data.source is not set; give a folder of videos: --config.data.source=FOLDER.")
    if config.source == "drawn":
        if height != width:
            raise UserError(f"Drawn clips are square; height={height} and width={width} differ in a stage's shapes.")
        return DrawnClips(split, frames, height)
    return FolderClips(
        config.source,
        split,
        frames,
        config.fps,
        height,
        width,
        cache_bytes=config.cache_bytes,
        max_bad_fraction=config.max_bad_fraction,
        caption_column=config.caption_column,
    )


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    encode: Callable[[list[str]], np.ndarray] | None = None,
    caption_dropout: float = 0.0,
) -> grain.IterDataset:
    """Endless batches {"video": uint8 [b, t, h, w, 3]}, with {"text": int32 [b, n]} where captions are encoded.

    Every epoch has each clip once, in an order of its own. Order and randomness are functions of the seed and the
    position alone: an iterator that is restored with `set_state` goes on with the same bytes.

    Args:
        source: the clips.
        batch_size: clips a batch.
        seed: of the order, of each clip's generator and of the dropped captions.
        encode: captions to ids, as `text.Vocabulary.encode`.
        caption_column: of a folder's `metadata.csv`; another one may name each clip's class.
        caption_dropout: probability of an empty caption.
    """

    def sample(index: int, rng: np.random.Generator) -> dict | None:
        clip = source.sample(index, rng)
        if clip is None:
            return None
        if encode is None:
            return {"video": clip["video"]}
        caption = "" if rng.random() < caption_dropout else clip["caption"]
        return {"video": clip["video"], "text": encode([caption])[0]}

    return (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(sample)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch_size))
        .batch(batch_size)
    )
