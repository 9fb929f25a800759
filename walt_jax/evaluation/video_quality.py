"""What VBench (Huang et al. 2023) says of a video without a reference, as far as it needs no large network."""

import itertools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.ndimage import map_coordinates
from skimage.registration import optical_flow_ilk

Clip = UInt8[np.ndarray, "t h w 3"]
Flow = Float[np.ndarray, "2 h w"]

DYNAMIC_FPS = 8  # frames a second of the pairs between which VBench looks for motion
FLOW_SIDE = 128  # pixels: larger frames are shrunk to this short side before their flow is computed
# VBench's limits: the mean of the fastest 5 % of pixels, in pixels a pair at a short side of 256; pairs of 16 frames.
FASTEST = 0.05
FAST = 6.0
FAST_PAIRS = 4


def flicker(clip: Clip) -> float:
    """VBench's temporal flickering, (255 - mean absolute difference of successive frames) / 255.

    VBench takes it of static scenes only: motion lowers it too. 1 is a clip without change; at least 2 frames.
    """
    differences = [np.abs(a.astype(np.int16) - b).mean() for a, b in itertools.pairwise(clip)]
    return float((255 - np.mean(differences)) / 255)


def optical_flow(one: Float[np.ndarray, "h w"], other: Float[np.ndarray, "h w"]) -> Flow:
    """(rows, columns) by which each pixel of `one` moves to `other`: iterative Lucas-Kanade (Le Besnerais 2005)."""
    return optical_flow_ilk(one, other, radius=5)


def is_dynamic(clip: Clip) -> bool:
    """Whether a clip moves, by VBench's rule on our optical flow; VBench computes its flow with RAFT.

    A pair of frames moves if the fastest 5 % of its pixels go further than 6 · (short side / 256) on average. A clip
    moves if a quarter of 16 frames' pairs do, in proportion to its length.

    Args:
        clip: at DYNAMIC_FPS frames a second, at least 2.
    """
    gray = _gray(clip, FLOW_SIDE)
    limit = FAST * min(gray.shape[1:]) / 256
    moving = 0
    for one, other in itertools.pairwise(gray):
        speed = np.sort(np.hypot(*optical_flow(one, other)), axis=None)
        moving += speed[-max(1, int(len(speed) * FASTEST)) :].mean() > limit
    return bool(moving >= max(1, round(FAST_PAIRS * len(clip) / 16)))


def smoothness(clip: Clip) -> float:
    """How well each second frame is interpolated from its neighbours: (255 - mean absolute error) / 255.

    VBench's motion smoothness with interpolation along our optical flow; VBench interpolates with AMT. At least 3
    frames, in gray. Motion at constant speed gives nearly 1.
    """
    gray = _gray(clip, FLOW_SIDE)
    errors = []
    for before, middle, after in zip(gray[:-2:2], gray[1:-1:2], gray[2::2], strict=False):
        forward, backward = optical_flow(before, after), optical_flow(after, before)
        guess = (_warped(before, -forward / 2) + _warped(after, -backward / 2)) / 2
        errors.append(np.abs(guess - middle).mean() * 255)
    return float((255 - np.mean(errors)) / 255)


def _warped(frame: Float[np.ndarray, "h w"], offset: Flow) -> Float[np.ndarray, "h w"]:
    """The frame, sampled at each pixel's place plus an offset."""
    grid = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return map_coordinates(frame, grid + offset, order=1, mode="nearest")


def _gray(clip: Clip, side: int) -> Float[np.ndarray, "t h w"]:
    """Luma in 0..1 (ITU-R 601), shrunk to a short side of at most `side`, antialiased."""
    gray = clip.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    _, height, width = gray.shape
    scale = side / min(height, width)
    if scale >= 1:
        return gray
    size = (round(width * scale), round(height * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in gray])
