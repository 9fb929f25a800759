"""Finds colour, shape and direction in a clip of the drawn grammar, by rules; nothing is learned, no caption is read.

Colour comes from the bright pixels. For the shape, each frame's silhouette is compared with every shape of equal area
at the same place. The direction is that of the centroid's path. A clip without a clear answer gets None, which is wrong
for every caption.
"""

import collections
import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.data.drawn import COLOURS, DIRECTIONS, SHAPES, Combination, coverage

BRIGHT = 0.5  # of a pixel's largest channel over the clip's: the inside of a shape, whatever its colour
COLOUR_DISTANCE = 0.35  # between a frame's mean bright pixel and the palette's nearest entry, both scaled to peak 1
SMALLEST, LARGEST = 0.10, 0.32  # of a shape's half extent in frame sides; drawn ones are in 0.14..0.24
OVERLAP = 0.80  # intersection over union with the redrawn shape, mean over frames
BLURS = (0, 1, 2)  # times that the redrawn shape is smoothed: video compression halves the resolution of colour
FRAMES_WITH_SHAPE = 0.9
FRAMES_THAT_AGREE = 0.8  # on the colour, and on the shape
SHORTEST_TRAVEL = 0.10  # in frame sides; drawn ones are at least 0.25
SIDEWAYS = 0.35  # at most, as a fraction of the travel
STEADINESS = 0.9  # correlation of the position with time


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a clip shows; None where it is unclear."""

    colour: str | None
    shape: str | None
    direction: str | None

    def right(self, combination: Combination) -> dict[str, bool]:
        """Whether colour, shape and direction are those of the caption."""
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
    silhouettes /= max(np.percentile(silhouettes, 99), 1e-6)  # a dim shape covers as many pixels
    silhouettes = np.clip(silhouettes, 0, 1)
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
    """The palette's entry that is nearest in most frames, whatever the brightness: a dim red is red."""
    brightness = pixels.max(-1)
    bright = brightness > BRIGHT * max(np.percentile(brightness, 99), BRIGHT)
    entries = np.array(list(COLOURS.values()), np.float32)
    entries /= entries.max(-1, keepdims=True)
    votes = collections.Counter()
    for frame, mask in zip(pixels, bright, strict=True):
        if mask.any():
            mean = frame[mask].mean(0)
            distances = np.linalg.norm(entries - mean / mean.max(), axis=-1)
            if distances.min() < COLOUR_DISTANCE:
                votes[list(COLOURS)[distances.argmin()]] += 1
    return _majority(votes, len(pixels))


def _majority(votes: collections.Counter, frames: int) -> str | None:
    """The answer of most frames, if enough of them agree; else None."""
    ((winner, count),) = votes.most_common(1) or [(None, 0)]
    return winner if count >= FRAMES_THAT_AGREE * frames else None


def _shape(silhouettes: Float[np.ndarray, "t h w"], areas, x, y) -> str | None:
    size = silhouettes.shape[1]
    overlaps = np.zeros((len(SHAPES), len(silhouettes)))
    for row, shape in enumerate(SHAPES):
        # Half extents from areas: a circle's is πr², a square's 4r², a triangle's 2r² with its centroid r/3 below the
        # centre of its bounding box.
        radii = np.sqrt(areas / {"circle": np.pi, "square": 4, "triangle": 2}[shape])
        if not SMALLEST <= np.median(radii) / size <= LARGEST:
            continue
        lower = radii / 3 if shape == "triangle" else 0 * radii
        redrawn = np.stack([coverage(shape, cx, cy, r, size) for cx, cy, r in zip(x, y - lower, radii, strict=True)])
        for times in BLURS:
            smooth = _smooth(redrawn, times)
            union = np.maximum(silhouettes, smooth).sum(axis=(1, 2))
            overlap = np.minimum(silhouettes, smooth).sum(axis=(1, 2)) / union
            overlaps[row] = np.maximum(overlaps[row], overlap)
    best = _majority(collections.Counter(SHAPES[row] for row in overlaps.argmax(0)), len(silhouettes))
    return best if best and overlaps[SHAPES.index(best)].mean() >= OVERLAP else None


def _smooth(images: Float[np.ndarray, "t h w"], times: int) -> Float[np.ndarray, "t h w"]:
    """Filters with the weights 1, 2, 1 along both axes, repeatedly."""
    for _ in range(times):
        for axis in (1, 2):
            images = (np.roll(images, 1, axis) + 2 * images + np.roll(images, -1, axis)) / 4
    return images


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
