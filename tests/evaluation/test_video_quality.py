"""Flicker, motion and smoothness of clips whose motion is known."""

import numpy as np
import pytest

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.evaluation.video_quality import flicker, is_dynamic, optical_flow, smoothness


def texture(height=64, width=96):
    """Gray waves of several directions, in 0..1."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return 0.5 + 0.15 * (np.sin(0.3 * x) + np.sin(0.25 * y) + np.sin(0.2 * x + 0.15 * y))


def moving(speed, frames=16):
    """A texture that moves to the right by `speed` pixels a frame, uint8 [t, 64, 64, 3]."""
    x = np.arange(64)
    rows = [np.stack([np.interp(x + 20 - speed * t, np.arange(96), row) for row in texture()]) for t in range(frames)]
    return np.round(255 * np.stack(rows)[..., None].repeat(3, -1)).astype(np.uint8)


def test_flicker_is_its_definition():
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    assert flicker(clip) == 1
    clip[1] = 51
    assert flicker(clip) == pytest.approx(1 - (51 + 51 + 0) / 3 / 255)


def test_the_flow_is_the_motion():
    one, other = (moving(1.5)[t, ..., 0] / 255 for t in (0, 1))
    rows, columns = optical_flow(one, other)
    inner = (slice(8, -8), slice(8, -8))
    assert np.abs(columns[inner] - 1.5).mean() < 0.15
    assert np.abs(rows[inner]).mean() < 0.15


@pytest.mark.parametrize(("speed", "expected"), [(0, False), (0.7, False), (2.5, True)])
def test_a_clip_is_dynamic_above_the_limit(speed, expected):
    """At a side of 64 the limit is 1.5 pixels a frame."""
    assert is_dynamic(moving(speed)) == expected


def test_a_quarter_of_the_pairs_must_move():
    still = moving(0)
    for pairs, expected in ((2, False), (5, True)):
        clip = still.copy()
        clip[:pairs] = moving(2.5)[pairs:0:-1]
        assert is_dynamic(clip) == expected


def test_constant_speed_is_smooth_and_shuffled_frames_are_not():
    clip = draw(COMBINATIONS[0], np.random.default_rng(0), 16, 64)
    shuffled = clip[np.random.default_rng(1).permutation(16)]
    assert smoothness(clip) > 0.99
    assert smoothness(clip) > smoothness(shuffled) + 0.01
    assert smoothness(moving(2)) > 0.98
    assert smoothness(np.zeros((3, 40, 30, 3), np.uint8)) == 1


def test_large_frames_are_shrunk():
    assert is_dynamic(moving(2.5).repeat(4, 1).repeat(4, 2)[:6])
