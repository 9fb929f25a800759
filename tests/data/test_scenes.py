"""Scenes: cuts, measures, and which scenes are dropped."""

import dataclasses
import os
import pathlib
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from walt_jax.data import scenes as scenes_lib
from walt_jax.data import watchdog
from walt_jax.data.media import write_video
from walt_jax.data.prepare_config import PrepareConfig
from walt_jax.data.scenes import Scene, find_scenes, objection
from walt_jax.data.video import ClipError

pytest.importorskip("scenedetect", reason='scenedetect is not installed: pip install -e ".[prepare]"')

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"

FPS = Fraction(10)


def texture(seed, height=48, width=64):
    """A picture of large random patches, uint8 [height, 2 · width, 3], to be moved over."""
    patches = np.random.default_rng(seed).integers(40, 256, (height // 8, width // 4, 3), np.uint8)
    return patches.repeat(8, 0).repeat(8, 1)


def shot(seed, frames, step=1, width=64):
    """The camera moves `step` pixels a frame to the right."""
    picture = texture(seed, width=width)
    return np.stack([picture[:, step * i : step * i + width] for i in range(frames)])


def scenes_of(tmp_path, frames, cut_threshold=3.0, max_seconds=100.0):
    write_video(tmp_path / "video.mp4", frames, float(FPS))
    return find_scenes(tmp_path / "video.mp4", FPS, cut_threshold, max_seconds)


@hypothesis.given(st.lists(st.integers(12, 30), min_size=1, max_size=4), st.integers(0, 1000))
@hypothesis.settings(max_examples=6, deadline=None)
def test_cuts_are_found_to_the_frame(tmp_path_factory, lengths, seed):
    frames = np.concatenate([shot(100 * seed + i, length) for i, length in enumerate(lengths)])
    scenes = scenes_of(tmp_path_factory.mktemp("cuts"), frames)
    assert [(scene.start, scene.end) for scene in scenes] == [
        (sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))
    ]


def test_without_a_threshold_nothing_is_cut(tmp_path):
    (scene,) = scenes_of(tmp_path, np.concatenate([shot(0, 12), shot(1, 12)]), cut_threshold=None)
    assert (scene.start, scene.end) == (0, 24)


@hypothesis.given(st.integers(0, 50), st.integers(1, 500), st.integers(1, 100))
def test_pieces_are_equal_short_enough_and_all_of_the_scene(start, length, longest):
    ends = np.array(scenes_lib._pieces(start, start + length, longest))
    sizes = np.diff(ends)
    assert ends[0] == start and ends[-1] == start + length
    assert sizes.max() <= longest and sizes.max() - sizes.min() <= 1
    assert len(sizes) == -(-length // longest)


def test_long_scenes_are_divided(tmp_path):
    scenes = scenes_of(tmp_path, np.concatenate([shot(0, 30), shot(1, 12)]), max_seconds=1.6)
    assert [(scene.start, scene.end) for scene in scenes] == [(0, 15), (15, 30), (30, 42)]


@pytest.mark.parametrize("step", [1, 2])
def test_motion_is_the_speed_of_the_picture(tmp_path, step):
    """A pan of `step` pixels of 48 a frame, ten frames a second."""
    (scene,) = scenes_of(tmp_path, shot(3, 24, step))
    assert scene.motion == pytest.approx(step * 10 / 48, rel=0.25)
    assert scene.static_fraction == 0 and scene.border_fraction == 0


def test_motion_does_not_depend_on_the_rate(tmp_path):
    write_video(tmp_path / "video.mp4", shot(3, 32), 16)
    slow, fast = (find_scenes(tmp_path / "video.mp4", Fraction(fps), None, 100)[0].motion for fps in (8, 16))
    assert slow == pytest.approx(fast, rel=0.1)


def test_a_still_picture_is_static_and_half_of_one_half(tmp_path):
    moving, still = shot(4, 40), shot(4, 40)[-1:].repeat(40, 0)
    (scene,) = scenes_of(tmp_path, still)
    assert scene.static_fraction == 1 and scene.motion == 0
    (scene,) = scenes_of(tmp_path, np.concatenate([moving, still]), cut_threshold=None)
    assert scene.static_fraction == pytest.approx(0.5, abs=0.05)


def test_a_small_thing_that_moves_is_not_static(tmp_path):
    frames = np.full((24, 96, 128, 3), 128, np.uint8)
    for i, frame in enumerate(frames):
        frame[40:48, 2 * i : 2 * i + 8] = 255
    assert scenes_of(tmp_path, frames)[0].static_fraction == 0


def test_border_is_the_share_that_stays_black(tmp_path):
    frames = shot(5, 24)
    frames[:, :6] = 0
    frames[:, -6:] = 0
    (scene,) = scenes_of(tmp_path, frames)
    assert scene.border_fraction == pytest.approx(12 / 48, abs=0.03)
    frames[:, :, :16] = 0
    assert scenes_of(tmp_path, frames)[0].border_fraction == pytest.approx(1 - 36 / 48 * 48 / 64, abs=0.03)
    frames[10:14, :6] = 200  # not throughout
    assert scenes_of(tmp_path, frames, None)[0].border_fraction < 0.5
    assert scenes_of(tmp_path, np.zeros_like(frames))[0].border_fraction == 1


def test_each_scene_has_measures_of_its_own(tmp_path):
    still = shot(6, 1).repeat(24, 0)
    letterboxed = shot(7, 24)
    letterboxed[:, :12] = 0
    scenes = scenes_of(tmp_path, np.concatenate([shot(8, 24), still, letterboxed]))
    assert [scene.static_fraction > 0.5 for scene in scenes] == [False, True, False]
    assert [scene.border_fraction > 0.2 for scene in scenes] == [False, False, True]


GOOD = Scene(0, 30, motion=0.1, static_fraction=0.2, border_fraction=0.1)
LIMITS = PrepareConfig(source="x", min_seconds=2, min_motion=0.05, max_motion=1.0, max_static_fraction=0.5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"end": 20}, None),
        ({"end": 19}, "length"),
        ({"motion": 0.04}, "motion"),
        ({"motion": 1.1}, "motion"),
        ({"static_fraction": 0.6}, "static"),
        ({"border_fraction": 0.3}, "border"),
    ],
)
def test_objections(change, expected):
    found = objection(dataclasses.replace(GOOD, **change), FPS, LIMITS)
    assert (found and found[0]) == expected
    assert found is None or "_" in found[1]  # names the knob


def broken(*_, **__):
    yield np.zeros((8, 8, 3), np.uint8)
    raise MemoryError("too large")


def crashing(*_, **__):
    yield np.zeros((8, 8, 3), np.uint8)
    os.abort()


@pytest.mark.parametrize(
    ("read", "reason"),
    [(broken, "decoding failed: MemoryError: too large"), (crashing, "decoding crashes: SIGABRT")],
)
def test_what_breaks_a_decoder_is_a_clip_error(tmp_path, monkeypatch, read, reason):
    monkeypatch.setattr(watchdog, "read_frames", read)
    with pytest.raises(ClipError) as error:
        find_scenes(tmp_path, FPS, 3.0, 10)
    assert str(error.value) == reason


def test_no_cut_in_a_real_shot():
    clip = SHARED / "clips/cogvideo__1.mp4"
    if not clip.exists():
        pytest.skip(f"{clip} is not there")
    assert len(find_scenes(clip, Fraction(8), 3.0, 100)) == 1


@pytest.mark.parametrize("move", [(0, 1), (1, 0), (1, 1), (-1, 1)])
def test_a_shape_on_black_is_content_and_bars_around_a_picture_are_not(tmp_path, move):
    frames = np.zeros((24, 96, 128, 3), np.uint8)
    for i, frame in enumerate(frames):
        y, x = 40 + move[0] * i, 40 + 2 * move[1] * i
        frame[y : y + 16, x : x + 16] = 255
    assert scenes_of(tmp_path, frames)[0].border_fraction < 0.2
    framed = np.zeros((24, 96, 128, 3), np.uint8)
    framed[:, 24:72, 32:96] = shot(9, 24)
    assert scenes_of(tmp_path, framed)[0].border_fraction == pytest.approx(0.75, abs=0.05)
