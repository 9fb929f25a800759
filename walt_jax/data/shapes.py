"""Shapes of clips: number of frames, stride and size."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from walt_jax.config import Positive

MOST_ELONGATED = 3.0  # maximum aspect ratio with `side`; videos beyond it are cropped


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """A shape of clips.

    Attributes:
        frames: number of frames; 1 is an image.
        height, width: in pixels; clips are cropped to these.
        side: instead of height and width: clips keep their aspect ratio, as far as `unit` allows, with about side²
            pixels.
        stride: every stride-th frame is taken.
        weight: with which this shape is drawn, not normalised.
        unit: (height, width) in pixels; with `side`, sizes are multiples of it.
    """

    frames: int
    height: int | None = None
    width: int | None = None
    side: int | None = None
    stride: int = 1
    weight: float = 1.0
    unit: tuple[int, int] = (1, 1)

    def __post_init__(self):
        if (self.side is None) != (self.height is not None and self.width is not None):
            raise ValueError("a shape has a side, or a height and a width")

    def sizes(self) -> set[tuple[int, int]]:
        """All (height, width) that clips of this shape can have."""
        if self.side is None:
            return {(self.height, self.width)}
        return {self.size(aspect, 1.0) for aspect in np.geomspace(1 / MOST_ELONGATED, MOST_ELONGATED, 1001)}

    @property
    def nominal(self) -> tuple[int, int, int]:
        """(frames, height, width) of a clip of a square video."""
        return (self.frames, *self.size(1, 1))

    @property
    def span(self) -> int:
        """The number of source frames from the first to the last, inclusive."""
        return 1 + (self.frames - 1) * self.stride

    def size(self, height: float, width: float) -> tuple[int, int]:
        """The (height, width) of this shape's clip of a video of `height` × `width` pixels."""
        if self.side is None:
            return self.height, self.width
        aspect = min(max(height / width, 1 / MOST_ELONGATED), MOST_ELONGATED)
        tall, wide = self.side * math.sqrt(aspect), self.side / math.sqrt(aspect)
        # Of the four neighbouring multiples of `unit`, the nearest in aspect ratio and number of pixels.
        sizes = [
            (max(1, rows) * self.unit[0], max(1, columns) * self.unit[1])
            for rows in (math.floor(tall / self.unit[0]), math.ceil(tall / self.unit[0]))
            for columns in (math.floor(wide / self.unit[1]), math.ceil(wide / self.unit[1]))
        ]
        return min(sizes, key=lambda size: abs(math.log(size[0] / tall)) + abs(math.log(size[1] / wide)))


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """One of the shapes of a stage's clips.

    Attributes:
        frames: number of frames; the data's if not set. 1 is an image.
        height, width: in pixels; the data's if not set.
        side: instead of height and width: clips keep their aspect ratio and have about side² pixels.
        stride: every stride-th frame is taken.
        batch_size: clips per batch; the stage's if not set.
        weight: with which this shape is drawn for a clip, not normalised. Clips too short for it get another shape.
    """

    frames: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None
    side: Positive | None = None
    stride: Positive = 1
    batch_size: Positive | None = None
    weight: float = 1.0

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight:g} is not above 0; leave the shape out instead")
        if self.side is not None and (self.height or self.width):
            raise ValueError("side keeps the aspect ratio, height and width set it; give one or the other")

    def resolve(self, frames: int, height: int, width: int, unit: tuple[int, int]) -> ClipShape:
        """The shape, with the data's values for those that are not set."""
        size = {"side": self.side} if self.side else {"height": self.height or height, "width": self.width or width}
        return ClipShape(self.frames or frames, stride=self.stride, weight=self.weight, unit=unit, **size)


def drawn_order(shapes: Sequence[ClipShape], rng: np.random.Generator) -> list[int]:
    """The order in which shapes are tried for a clip: drawn by weight; later ones are for clips that are too short."""
    if len(shapes) == 1:
        return [0]
    weights = np.array([shape.weight for shape in shapes])
    return rng.choice(len(shapes), len(shapes), replace=False, p=weights / weights.sum()).tolist()
