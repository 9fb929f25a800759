"""What clips are made into: how many frames, how far apart, and of which size."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from walt_jax.config import Positive

MOST_ELONGATED = 3.0  # sides of a clip that keeps its aspect ratio; of what is longer, a part is shown


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """One of the shapes that clips come in.

    Attributes:
        frames: of a clip; 1 is an image.
        height, width: in pixels: the clip is cropped to these.
        side: instead of these: the clip keeps its aspect ratio as nearly as `unit` allows, and has about side² pixels.
        stride: every stride-th frame is taken.
        weight: how often a clip gets this shape, over the sum of all weights.
        unit: (height, width) of which the sizes are multiples where `side` is given.
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
        """The (height, width) of all clips of this shape, whatever they are made from."""
        if self.side is None:
            return {(self.height, self.width)}
        return {self.size(aspect, 1.0) for aspect in np.geomspace(1 / MOST_ELONGATED, MOST_ELONGATED, 1001)}

    @property
    def nominal(self) -> tuple[int, int, int]:
        """(frames, height, width) of a clip that is made from a square video."""
        return (self.frames, *self.size(1, 1))

    @property
    def span(self) -> int:
        """How many frames lie between the first and the last, these included."""
        return 1 + (self.frames - 1) * self.stride

    def size(self, height: float, width: float) -> tuple[int, int]:
        """The (height, width) of a clip of this shape that is made from a video of so many pixels."""
        if self.side is None:
            return self.height, self.width
        aspect = min(max(height / width, 1 / MOST_ELONGATED), MOST_ELONGATED)
        tall, wide = self.side * math.sqrt(aspect), self.side / math.sqrt(aspect)
        # Of the four sizes around it, the one whose aspect ratio and number of pixels are nearest.
        sizes = [
            (max(1, rows) * self.unit[0], max(1, columns) * self.unit[1])
            for rows in (math.floor(tall / self.unit[0]), math.ceil(tall / self.unit[0]))
            for columns in (math.floor(wide / self.unit[1]), math.ceil(wide / self.unit[1]))
        ]
        return min(sizes, key=lambda size: abs(math.log(size[0] / tall)) + abs(math.log(size[1] / wide)))


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """One of the shapes that a stage's clips come in.

    Attributes:
        frames: of a clip, instead of the data's; 1 is an image.
        height, width: of a clip, instead of the data's.
        side: instead of height and width: clips keep their aspect ratio and have about side² pixels.
        stride: every stride-th frame is taken.
        batch_size: clips a batch, instead of the stage's.
        weight: of this shape among the stage's: how often a clip gets it, over the sum of all weights. Clips that are
            too short for it get another one.
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
        """The shape, with the data's numbers where it has none of its own."""
        size = {"side": self.side} if self.side else {"height": self.height or height, "width": self.width or width}
        return ClipShape(self.frames or frames, stride=self.stride, weight=self.weight, unit=unit, **size)


def drawn_order(shapes: Sequence[ClipShape], rng: np.random.Generator) -> list[int]:
    """The order in which a clip tries the shapes: the first one by weight, the others in case it is too short."""
    if len(shapes) == 1:
        return [0]
    weights = np.array([shape.weight for shape in shapes])
    return rng.choice(len(shapes), len(shapes), replace=False, p=weights / weights.sum()).tolist()
