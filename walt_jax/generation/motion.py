"""Rough frames between two given ones, along the motion from one to the other, for the model to follow part of the way.

MoG (Zhang et al. 2025) conditions interpolation on what a flow network makes of the two frames. Here the flow is block
matching, which needs no weights, and the rough frames are given as any other media are: with a strength below 1, so
that the model corrects what block matching gets wrong. Pixels are warped, not latents: a latent frame stands for
several frames (`docs/generation.md` has the error of each).
"""

import math

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.ndimage import uniform_filter

Frame = UInt8[np.ndarray, "h w 3"]
Flow = Float[np.ndarray, "2 h w"]

MATCHED_AT = 32  # pixels: of the short side at which every displacement is tried
FARTHEST = 0.6  # of the short side, that anything moves between the two frames
# Of the short side: half of the squares that are matched, whose errors are added up. The small one finds edges, the
# large one decides where there is no texture.
SQUARES = (0.05, 0.15, 0.3)
FAR = 1.0  # squared error, in gray values of 255, that a match may cost more for each pixel that it is nearer
AGREE = 0.08  # of the short side, that there and back may differ


def block_flow(one: Frame, other: Frame) -> Flow:
    """(rows, columns) by which each pixel of `one` moves to `other`: the displacement whose squares differ least.

    Every whole displacement up to `FARTHEST` is tried on frames of `MATCHED_AT` pixels, then each pixel's neighbouring
    ones on frames twice as large, until they are as large as those given. Of equally good ones the nearest counts, so
    that what has no texture stands still.

    Args:
        one, other: of equal size.
    """
    height, width = one.shape[:2]
    halvings = max(0, math.ceil(math.log2(min(height, width) / MATCHED_AT)))
    sizes = [(round(height / 2**halving), round(width / 2**halving)) for halving in reversed(range(halvings + 1))]
    flow, reach = np.zeros((2, *sizes[0]), np.int32), round(FARTHEST * min(sizes[0]))
    for size in sizes:
        if size != sizes[0]:
            large = [np.asarray(Image.fromarray(part).resize(size[::-1], Image.Resampling.NEAREST)) for part in flow]
            flow, reach = 2 * np.stack(large), 1
        flow = _nearest(_resized(one, size), _resized(other, size), flow, reach)
    return flow.astype(np.float32)


def _nearest(
    start: Float[np.ndarray, "h w 3"], end: Float[np.ndarray, "h w 3"], flow: Int[np.ndarray, "2 h w"], reach: int
) -> Int[np.ndarray, "2 h w"]:
    """The best flow that differs from the given one by at most `reach` along each axis."""
    height, width = start.shape[:2]
    squares = [2 * max(1, round(half * min(height, width))) + 1 for half in SQUARES]
    grid = np.mgrid[:height, :width]
    best, found = np.full((height, width), np.inf), flow
    steps = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    for step in sorted(steps, key=lambda step: math.hypot(*step)):
        tried = flow + np.array(step, np.int32)[:, None, None]
        y, x = grid + tried
        error = np.square(start - end[y.clip(0, height - 1), x.clip(0, width - 1)]).mean(-1)
        error = sum(uniform_filter(error, square, mode="nearest") for square in squares) + FAR * np.hypot(*tried)
        better = error < best
        best, found = np.where(better, error, best), np.where(better[None], tried, found)
    return found


def between(one: Frame, other: Frame, count: int) -> UInt8[np.ndarray, "count h w 3"]:
    """`count` frames between two, evenly spaced in time, in which what moves does so in a straight line.

    Pixels of each frame are moved along its flow; where both arrive they are blended by their nearness in time. What
    moves covers what stands still. Where nothing arrives, something has left or will come, and is in one of the frames:
    the other frame's pixel is shown.
    """
    there, back = block_flow(one, other), block_flow(other, one)
    sure = [_agree(there, back), _agree(back, there)]
    leaves = sure[0] & (np.hypot(*there) > 0)
    still = np.where(leaves[..., None], other, one).astype(np.float32)
    found = []
    for number in range(1, count + 1):
        time = number / (count + 1)
        first, has_first = _moved(one, time * there, sure[0])
        second, has_second = _moved(other, (1 - time) * back, sure[1])
        weight = np.where(has_first & has_second, time, np.where(has_second, 1.0, 0.0))[..., None]
        frame = (1 - weight) * first + weight * second
        found.append(np.where((has_first | has_second)[..., None], frame, still))
    return np.round(np.stack(found)).clip(0, 255).astype(np.uint8)


def _resized(frame: Frame, size: tuple[int, int]) -> Float[np.ndarray, "h w 3"]:
    if frame.shape[:2] != size:
        frame = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BOX))
    return frame.astype(np.float32)


def _agree(flow: Flow, back: Flow) -> np.ndarray:
    """Where a pixel that moves and then moves back arrives near where it was."""
    height, width = flow.shape[1:]
    grid = np.mgrid[:height, :width]
    y, x = np.floor(grid + flow + 0.5).astype(int)  # np.round would take every other half down
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    returned = back[:, y.clip(0, height - 1), x.clip(0, width - 1)]
    return inside & (np.hypot(*(flow + returned)) <= AGREE * min(height, width))


def _moved(frame: Frame, flow: Flow, sure: np.ndarray) -> tuple[Float[np.ndarray, "h w 3"], np.ndarray]:
    """The frame with its pixels moved, and where any arrived; of several the one that moves farthest."""
    height, width = flow.shape[1:]
    grid = np.mgrid[:height, :width]
    y, x = np.floor(grid + flow + 0.5).astype(int)
    kept = sure & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    order = np.argsort(np.hypot(*flow)[kept], kind="stable")  # the last one written is seen
    target = y[kept][order], x[kept][order]
    moved, there = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
    moved[target], there[target] = frame[kept][order], True
    return moved, there
