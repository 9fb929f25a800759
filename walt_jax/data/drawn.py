"""Drawn clips: one coloured shape moving over black, with its caption. Deterministic, endless, built in.

The grammar is `a {colour} {shape} moving {direction}`. One in eight of its 72 sentences is held out of training, so
that composition can be measured: every colour, shape and direction is trained, but not these combinations of them.
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

# In fractions of the frame's side: a shape's half extent, and how far it travels from the first frame to the last.
RADIUS = (0.14, 0.24)
TRAVEL = (0.25, 0.50)


@dataclasses.dataclass(frozen=True)
class Combination:
    """What a caption says."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


COMBINATIONS = tuple(itertools.starmap(Combination, itertools.product(COLOURS, SHAPES, DIRECTIONS)))


def is_held_out(combination: Combination) -> bool:
    """True for the 9 of 72 combinations that are never trained on; every colour, shape and direction is among them."""
    colour = tuple(COLOURS).index(combination.colour)
    shape = SHAPES.index(combination.shape)
    direction = tuple(DIRECTIONS).index(combination.direction)
    return (colour + 2 * shape + 3 * direction) % 8 == 0


def combinations(split: str) -> tuple[Combination, ...]:
    """The combinations of `split`: "train" (63), "held_out" (9) or "all" (72)."""
    return tuple(c for c in COMBINATIONS if split == "all" or is_held_out(c) == (split == "held_out"))


def coverage(shape: str, centre_x: float, centre_y: float, radius: float, size: int) -> np.ndarray:
    """How much of each pixel the shape covers.

    Args:
        shape: one of `SHAPES`. A square's side and a triangle's base and height are `2 * radius`.
        centre_x, centre_y: of the shape's bounding box, in pixels from the top left corner of the frame.
        radius: half the extent, in pixels.
        size: the frame's side, in pixels.

    Returns:
        float32 [size, size] in 0..1, anti-aliased over one pixel at the edge.
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
    """Draws a clip of `combination` at a random place, size and speed; the whole path lies inside the frame.

    Returns:
        uint8 [frames, size, size, 3].
    """
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*TRAVEL)  # 2 · 0.24 + 0.50 < 1: there is always room
    step = np.array(DIRECTIONS[combination.direction], dtype=np.float64)
    lowest = radius + np.maximum(-step, 0) * travel  # of the first frame's centre, so that the last fits too
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
    """A source with one entry per combination of its split; what else varies comes from the generator.

    Attributes:
        split: "train", "held_out" or "all".
        shapes: of clips, square.
    """

    split: str
    shapes: tuple[ClipShape, ...]

    def __len__(self) -> int:
        return len(combinations(self.split))

    @property
    def captions(self) -> list[str]:
        return [c.caption for c in combinations(self.split)]

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        """Returns {"video": uint8 [frames, size, size, 3], "caption": str, "shape": its index}."""
        combination = combinations(self.split)[index]
        number = drawn_order(self.shapes, rng)[0]
        shape = self.shapes[number]
        video = draw(combination, rng, shape.span, shape.size(1, 1)[0])[:: shape.stride]
        return {"video": video, "caption": combination.caption, "shape": number}
