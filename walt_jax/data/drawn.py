"""The built-in data set: clips of one coloured shape that moves over black, with captions, drawn on the fly.

Captions are `a {colour} {shape} moving {direction}`. Nine of the 72 combinations are held out, to measure
compositional generalisation: training has every colour, shape and direction, but not these combinations of them.
"""

import dataclasses
import itertools

import numpy as np

from walt_jax.data.shapes import ClipShape, drawn_order

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "purple": (160, 0, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y pointing down

# In units of the frame's side: half the shape's extent, and how far it moves from the first frame to the last.
RADIUS = (0.14, 0.24)
TRAVEL = (0.25, 0.50)


@dataclasses.dataclass(frozen=True)
class Combination:
    """What a clip shows."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


COMBINATIONS = tuple(itertools.starmap(Combination, itertools.product(COLOURS, SHAPES, DIRECTIONS)))


def is_held_out(combination: Combination) -> bool:
    """Whether a combination is one of the 9 that are held out; they contain every colour, shape and direction."""
    colour = tuple(COLOURS).index(combination.colour)
    shape = SHAPES.index(combination.shape)
    direction = tuple(DIRECTIONS).index(combination.direction)
    return (colour + 2 * shape + 3 * direction) % 8 == 0


def combinations(split: str) -> tuple[Combination, ...]:
    """The combinations of `split`: "train" (63), "held_out" (9) or "all" (72)."""
    return tuple(c for c in COMBINATIONS if split == "all" or is_held_out(c) == (split == "held_out"))


def coverage(shape: str, centre_x: float, centre_y: float, radius: float, size: int) -> np.ndarray:
    """The fraction of each pixel that the shape covers.

    Args:
        shape: one of `SHAPES`. A square's side and a triangle's base and height are `2 * radius`.
        centre_x, centre_y: centre of the shape's bounding box, in pixels from the frame's top left corner.
        radius: half the shape's extent, in pixels.
        size: side of the frame, in pixels.

    Returns:
        float32 [size, size] in [0, 1], anti-aliased over one pixel at the edge.
    """
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = axis[None, :] - np.float32(centre_x), axis[:, None] - np.float32(centre_y)
    if shape == "circle":
        distance = np.sqrt(x**2 + y**2) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    elif shape == "triangle":  # apex up: below the two slanted sides |x| = (y + r) / 2, above the base y = r
        slanted = (2 * np.abs(x) - (y + radius)) / np.sqrt(np.float32(5))
        distance = np.maximum(slanted, y - radius)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def draw(combination: Combination, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Draws a clip with a random start, size and speed; the shape stays inside the frame.

    Returns:
        uint8 [frames, size, size, 3].
    """
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*TRAVEL)  # fits: 2 · 0.24 + 0.50 < 1
    step = np.array(DIRECTIONS[combination.direction], dtype=np.float64)
    lowest = radius + np.maximum(-step, 0) * travel  # bounds of the first centre: the whole path is inside
    highest = 1 - radius - np.maximum(step, 0) * travel
    start = rng.uniform(lowest, highest)
    colour = np.array(COLOURS[combination.colour], dtype=np.float32)
    clip = np.empty((frames, size, size, 3), np.uint8)
    for frame in range(frames):
        x, y = (start + step * travel * frame / max(frames - 1, 1)) * size
        clip[frame] = np.round(coverage(combination.shape, x, y, radius * size, size)[..., None] * colour)
    return clip


@dataclasses.dataclass(frozen=True)
class DrawnClips:
    """A source with one clip per combination of its split; position, size and speed come from the generator.

    Attributes:
        split: "train", "held_out" or "all".
        shapes: the clips' shapes, square.
    """

    split: str
    shapes: tuple[ClipShape, ...]

    def __len__(self) -> int:
        return len(combinations(self.split))

    @property
    def captions(self) -> list[str]:
        return [c.caption for c in combinations(self.split)]

    def kind(self, index: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """See `pipeline.Source`."""
        number = drawn_order(self.shapes, rng)[0]
        shape = self.shapes[number]
        return number, shape.frames, *shape.size(1, 1)

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        """Returns {"video": uint8 [frames, size, size, 3], "caption": str, "shape": its index}."""
        combination = combinations(self.split)[index]
        number = drawn_order(self.shapes, rng)[0]
        shape = self.shapes[number]
        video = draw(combination, rng, shape.span, shape.size(1, 1)[0])[:: shape.stride]
        return {"video": video, "caption": combination.caption, "shape": number}
