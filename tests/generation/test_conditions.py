"""What is given of a video: where it lies, how long it is followed, which latent positions it fills."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.errors import UserError
from walt_jax.evaluation.reconstruction import psnr_db
from walt_jax.generation.asking import Condition
from walt_jax.generation.conditions import Media, extend, latent_groups, place, until
from walt_jax.generation.latent_diffusion import NEVER

SIZE, STRIDE = (17, 8, 8), 4
STRIDES = (STRIDE, 4, 4)


def numbered(count, first=0, size=(8, 8)):
    """Frames each of one value."""
    return np.broadcast_to(np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, *size, 3))


def frames_given(canvas):
    return np.flatnonzero((canvas.strength > 0).all(axis=(1, 2))).tolist()


def test_a_first_and_a_last_picture():
    """The last one stands still for its latent frame; frames between repeat the one before."""
    canvas = place([Media(numbered(1, 10)), Media(numbered(1, 20), -1)], SIZE, STRIDE)
    assert canvas.video[:, 0, 0, 0].tolist() == [10] * 13 + [20] * 4
    assert frames_given(canvas) == [0, 13, 14, 15, 16]
    assert len(canvas.notes) == 1 and "13 to 16" in canvas.notes[0]
    assert (until(canvas.strength, STRIDES)[:, 0, 0, 0] == [0, NEVER, NEVER, NEVER, 0]).all()


def test_motion_leads_from_the_first_picture_to_the_last():
    """It is followed with its strength, but in the last picture's latent frame, which is given."""
    clip = draw(COMBINATIONS[0], np.random.default_rng(0), 17, 32)
    media = [Media(clip[:1]), Media(clip[-1:], -1)]
    canvas = place(media, (17, 32, 32), STRIDE, motion=0.25)
    assert (canvas.video[[0, -1]] == clip[[0, -1]]).all()
    assert psnr_db(canvas.video, clip) > 25
    assert until(canvas.strength, STRIDES)[:, 0, 0, 0].tolist() == [0, 0.75, 0.75, 0.75, 0]
    assert any("1 to 15" in note for note in canvas.notes)
    with pytest.raises(UserError, match="two pictures or clips"):
        place(media[:1], (17, 32, 32), STRIDE, motion=0.25)


def test_what_fills_no_whole_latent_frame_is_generated():
    canvas = place([Media(numbered(6), 3)], SIZE, STRIDE)
    assert (until(canvas.strength, STRIDES)[:, 0, 0, 0] == [NEVER, NEVER, 0, NEVER, NEVER]).all()
    assert "no whole latent frame" in canvas.notes[0]


def test_a_mask_frees_positions_with_any_white_pixel():
    white = np.zeros((1, 8, 8), bool)
    white[0, 3, 5] = True
    canvas = place([Media(numbered(17))], SIZE, STRIDE, white)
    free = until(canvas.strength, STRIDES)[..., 0] == NEVER
    assert (free == np.array([[False, True], [False, False]])).all()
    assert (canvas.video == numbered(17)).all()  # positions beside it are encoded with what is there


def test_strength_is_the_time_that_is_left():
    canvas = place([Media(numbered(17), strength=0.6)], SIZE, STRIDE)
    np.testing.assert_allclose(until(canvas.strength, STRIDES), 0.4, rtol=1e-6)
    free = place([Media(numbered(17), strength=0.0)], SIZE, STRIDE)
    assert (until(free.strength, STRIDES) == NEVER).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-17, 16), st.integers(1, 20), st.floats(0.1, 1)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_each_position_is_that_of_its_weakest_pixel(media, seed):
    """Against a loop over pixels; later media cover earlier ones."""
    white = np.random.default_rng(seed).random(SIZE) < 0.05
    strength = np.zeros(SIZE)
    for start, count, share in media:
        start = start % 17
        if count == 1 and start > 0:
            start, count = (start - 1) // 4 * 4 + 1, 4
        for frame in range(start, min(start + count, 17)):
            strength[frame] = np.float32(share)
    strength[white] = 0
    got = until(place([Media(numbered(c), s, w) for s, c, w in media], SIZE, STRIDE, white).strength, STRIDES)
    for t, group in enumerate(latent_groups(17, 4)):
        for y in range(2):
            for x in range(2):
                weakest = strength[group, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].min()
                assert got[t, y, x, 0] == pytest.approx(1 - weakest if weakest else NEVER, abs=1e-6)


def test_a_clip_goes_on():
    forward = extend("forward", Media(numbered(19), name="a"), None, 17, 4)
    assert (forward.frames, forward.shown) == (25, slice(0, 25))
    assert forward.media[0].frames[:, 0, 0, 0].tolist() == list(range(2, 19))  # its end is what goes on
    assert "17 frames of 19" in forward.notes[0]
    backward = extend("backward", Media(numbered(19)), None, 17, 4)
    assert backward.frames == 25 and backward.media[0].start == 9
    assert backward.media[0].frames[:, 0, 0, 0].tolist() == list(range(16))


@pytest.mark.parametrize("count", [1, 17])
def test_a_loop_ends_with_its_first_frames_and_shows_them_once(count):
    loop = extend("loop", Media(numbered(count)), None, 17, 4)
    canvas = place(loop.media, (loop.frames, 8, 8), 4)
    first = canvas.video[:4] if count > 1 else canvas.video[:1].repeat(4, axis=0)
    assert (canvas.video[loop.shown.stop :] == first).all()
    assert loop.frames - loop.shown.stop == 4 and loop.shown.start == 0


@pytest.mark.parametrize(
    ("media", "says"),
    [
        ([Media(numbered(17))], "nothing to generate"),
        ([Media(numbered(1), 17, name="x.png")], "x.png is placed at frame 17"),
        ([Media(numbered(1), -18)], "frames 0 to 16"),
        ([Media(numbered(1), strength=1.5)], "from 0 to 1"),
        ([Media(numbered(1, size=(4, 8)))], "4 × 8"),
    ],
)
def test_what_can_not_be_met_is_said(media, says):
    with pytest.raises(UserError, match=says):
        place(media, SIZE, STRIDE)


def test_conditions_as_they_are_written():
    assert Condition.parse("a/b.png") == Condition("a/b.png")
    assert Condition.parse("b.mp4@-5") == Condition("b.mp4", -5)
    assert Condition.parse("b.mp4@3:0.25") == Condition("b.mp4", 3, 0.25)
    for wrong in ("", "@3", "b@x", "b@1:y", "b@1:.5:2"):
        with pytest.raises(UserError, match=r"clip\.mp4@0:0\.6"):
            Condition.parse(wrong)
