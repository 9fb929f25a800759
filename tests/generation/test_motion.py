"""Rough frames along the motion between two: against drawn clips, whose motion is known, and worked by hand."""

import numpy as np
import pytest

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.evaluation.reconstruction import psnr_db
from walt_jax.generation.motion import between, block_flow

RNG = np.random.default_rng(0)


def textured(side):
    return RNG.integers(0, 255, (side, side, 3), dtype=np.uint8)


def test_a_shifted_texture_has_the_shift_as_flow():
    whole = textured(48)
    one, other = whole[8:40, 8:40], whole[3:35, 12:44]  # what is at (y, x) in one is at (y + 5, x - 4) in the other
    flow = block_flow(one, other)
    inside = flow[:, 8:-8, 8:-8]
    assert (inside == np.array([5, -4])[:, None, None]).all()


def test_what_has_no_texture_stands_still():
    assert not block_flow(np.full((24, 32, 3), 90, np.uint8), np.full((24, 32, 3), 90, np.uint8)).any()


def test_a_square_over_a_textured_background():
    """Halfway it is halfway, and what it covered is shown again; next to it the background is blurred."""
    background = textured(32) // 4
    clip = np.stack([background] * 9)
    for frame in range(9):
        clip[frame, 10:18, 4 + 2 * frame : 12 + 2 * frame] = (250, 240, 20)
    found = between(clip[0], clip[-1], 7)
    square = (found[..., 0] > 150) == (clip[1:-1, ..., 0] > 150)
    assert (~square).sum(axis=(1, 2)).max() <= 3
    assert (found[:, 26:] == background[26:]).all()
    assert np.abs(found.astype(int) - clip[1:-1])[square].mean() < 8


@pytest.mark.parametrize("side", [32, 80])
def test_drawn_clips_come_back_from_their_ends(side):
    """80 pixels are matched at 20, 40 and 80. A blend of both ends is far off."""
    for number in (1, 30, 60):
        clip = draw(COMBINATIONS[number], np.random.default_rng(number), 17, side)
        blend = [np.round(clip[0] + part * (clip[-1].astype(float) - clip[0])) for part in np.arange(1, 16) / 16]
        found = between(clip[0], clip[-1], 15)
        assert psnr_db(clip[1:-1], found) > psnr_db(clip[1:-1], np.stack(blend).astype(np.uint8)) + 8
