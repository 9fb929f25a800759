"""Says what a clip of the drawn grammar shows. It knows the drawing rules and is given no caption; nothing is learned.

Colour comes from the bright pixels, shape from redrawing each frame's silhouette as every shape of the same area and
place, direction from the path of the centroid. What is no clear instance is None: a wrong answer to any caption.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.data.drawn import COLOURS, DIRECTIONS, SHAPES, Combination, coverage

BRIGHT = 0.5  # of a pixel's largest channel: the inside of a shape, whatever its colour
COLOUR_DISTANCE = 0.35  # between the mean bright pixel and the palette's nearest entry, in RGB of 0..1
SMALLEST, LARGEST = 0.10, 0.32  # of a shape's half extent in frame sides; drawn ones are in 0.14..0.24
OVERLAP = 0.80  # intersection over union with the redrawn shape, mean over frames
FRAMES_WITH_SHAPE = 0.9
SHORTEST_TRAVEL = 0.10  # in frame sides; drawn ones are at least 0.25
SIDEWAYS = 0.35  # at most, as a fraction of the travel
STEADINESS = 0.9  # correlation of the position with time


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was seen; None where it is unclear."""

    colour: str | None
    shape: str | None
    direction: str | None

    def right(self, combination: Combination) -> dict[str, bool]:
        """For each of colour, shape and direction, whether it is what the caption says."""
        return {name: getattr(self, name) == getattr(combination, name) for name in ("colour", "shape", "direction")}


def judge(clip: UInt8[np.ndarray, "t h w 3"]) -> Verdict:
    """Judges a clip of square frames."""
    pixels = clip.astype(np.float32) / 255
    colour = _colour(pixels)
    if colour is None:
        return Verdict(None, None, None)
    rgb = np.array(COLOURS[colour], np.float32) / 255
    silhouettes = np.clip(pixels @ rgb / (rgb @ rgb), 0, 1)
    silhouettes[silhouettes < 0.1] = 0  # compression noise, which far from the shape would pull the centroid
    areas = silhouettes.sum(axis=(1, 2))
    size = clip.shape[1]
    visible = areas > (SMALLEST * size) ** 2
    if visible.mean() < FRAMES_WITH_SHAPE:
        return Verdict(colour, None, None)
    axis = np.arange(size) + 0.5
    x = (silhouettes.sum(1) @ axis)[visible] / areas[visible]
    y = (silhouettes.sum(2) @ axis)[visible] / areas[visible]
    shape = _shape(silhouettes[visible], areas[visible], x, y)
    return Verdict(colour, shape, _direction(np.flatnonzero(visible), x / size, y / size))


def _colour(pixels: Float[np.ndarray, "t h w 3"]) -> str | None:
    bright = pixels[pixels.max(-1) > BRIGHT]
    if not len(bright):
        return None
    mean = bright.mean(0)
    # Palette entries as bright as the clip: a shape that is a little dark has the hue of its colour all the same.
    distances = {}
    for name, rgb in COLOURS.items():
        entry = np.array(rgb, np.float32) / 255
        distances[name] = float(np.linalg.norm(mean / mean.max() - entry / entry.max()))
    nearest = min(distances, key=distances.get)
    return nearest if distances[nearest] < COLOUR_DISTANCE else None


def _shape(silhouettes: Float[np.ndarray, "t h w"], areas, x, y) -> str | None:
    size = silhouettes.shape[1]
    overlaps = {}
    for shape in SHAPES:
        # Half extents from areas: a circle's is πr², a square's 4r², a triangle's 2r² with its centroid r/3 below the
        # centre of its bounding box.
        radii = np.sqrt(areas / {"circle": np.pi, "square": 4, "triangle": 2}[shape])
        lower = radii / 3 if shape == "triangle" else 0 * radii
        redrawn = np.stack([coverage(shape, cx, cy, r, size) for cx, cy, r in zip(x, y - lower, radii, strict=True)])
        union = np.maximum(silhouettes, redrawn).sum(axis=(1, 2))
        overlaps[shape] = float((np.minimum(silhouettes, redrawn).sum(axis=(1, 2)) / union).mean())
        if not SMALLEST <= np.median(radii) / size <= LARGEST:
            overlaps[shape] = 0.0
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= OVERLAP else None


def _direction(frames, x, y) -> str | None:
    path = np.stack([x, y], -1)
    third = max(len(path) // 3, 1)
    travel = path[-third:].mean(0) - path[:third].mean(0)
    main = int(np.abs(travel).argmax())
    # The means of the outer thirds are 2/3 of the way apart.
    if np.abs(travel[main]) < SHORTEST_TRAVEL * 2 / 3 or np.abs(travel[1 - main]) > SIDEWAYS * np.abs(travel[main]):
        return None
    if np.abs(np.corrcoef(frames, path[:, main])[0, 1]) < STEADINESS:
        return None
    step = [0, 0]
    step[main] = int(np.sign(travel[main]))
    return next(name for name, way in DIRECTIONS.items() if way == tuple(step))
