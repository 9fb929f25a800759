"""Drawn clips show what their caption says, inside the frame, and are a function of the generator."""

import collections
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data import drawn
from walt_jax.data.drawn import (
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    SHAPES,
    DrawnClips,
    combinations,
    coverage,
    draw,
    is_held_out,
)
from walt_jax.data.shapes import ClipShape

COMBINATION, SEED = st.sampled_from(COMBINATIONS), st.integers(0, 10**6)
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def test_nine_of_72_are_held_out_and_every_word_is_in_both_splits():
    train, held_out = combinations("train"), combinations("held_out")
    assert (len(train), len(held_out), len(combinations("all"))) == (63, 9, 72)
    assert set(train) | set(held_out) == set(COMBINATIONS)
    assert len({combination.caption for combination in COMBINATIONS}) == 72
    for word, values in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        counts = collections.Counter(getattr(combination, word) for combination in held_out)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1  # spread evenly
        # Each pair of words is trained in some combination, so only the triple is held out.
    for a, b in (("colour", "shape"), ("colour", "direction"), ("shape", "direction")):
        pairs = {(getattr(c, a), getattr(c, b)) for c in train}
        assert len(pairs) == len({(getattr(c, a), getattr(c, b)) for c in COMBINATIONS})
    assert all(is_held_out(combination) for combination in held_out)


def supersampled(shape, centre_x, centre_y, radius, size, n=16):
    """The twin: the share of n × n points of each pixel that the shape's definition has inside."""
    axis = (np.arange(size * n) + 0.5) / n
    x, y = axis[None, :] - centre_x, axis[:, None] - centre_y
    inside = {
        "circle": x**2 + y**2 <= radius**2,
        "square": (abs(x) <= radius) & (abs(y) <= radius),
        # Apex in the middle above, base below, both 2 r long and high.
        "triangle": (y <= radius) & (y >= -radius) & (abs(x) <= (y + radius) / 2),
    }[shape]
    return inside.reshape(size, n, size, n).mean((1, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([16, 32, 64]),
    st.floats(0.3, 0.7),
    st.floats(0.3, 0.7),
    st.floats(0.14, 0.24),
)
def test_coverage_is_the_shapes_share_of_each_pixel(shape, size, x, y, radius):
    x, y, radius = x * size, y * size, radius * size
    ours, twin = coverage(shape, x, y, radius, size), supersampled(shape, x, y, radius, size)
    assert ours.dtype == np.float32
    assert ours.min() >= 0
    assert ours.max() <= 1
    # It is anti-aliased by the distance from the nearest edge: exact away from edges, close on them, rough at corners.
    inner, outer = (supersampled(shape, x, y, radius + margin, size) for margin in (-1.6, 1.6))
    np.testing.assert_array_equal(ours[inner == 1], 1)
    np.testing.assert_array_equal(ours[outer == 0], 0)
    assert np.abs(ours - twin).max() < 0.4
    assert np.abs(ours - twin).sum() < 0.1 * ((outer > 0) & (inner < 1)).sum()
    assert abs(ours.sum() / twin.sum() - 1) < 2 / size
    area = {"circle": np.pi, "square": 4, "triangle": 2}[shape] * radius**2
    assert abs(twin.sum() / area - 1) < 0.04


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="unknown shape 'hexagon'"):
        coverage("hexagon", 8, 8, 4, 16)


def drawn_with(combination, seed, frames, size):
    """The clip, and the shape, centre and half extent of each of its frames in frame sides."""
    placed = []

    def spy(shape, x, y, radius, side):
        placed.append((shape, x / side, y / side, radius / side))
        return coverage(shape, x, y, radius, side)

    with mock.patch.object(drawn, "coverage", spy):
        clip = draw(combination, np.random.default_rng(seed), frames, size)
    shapes, *places = zip(*placed, strict=True)
    assert set(shapes) == {combination.shape}
    return clip, *map(np.array, places)


@settings(max_examples=100, deadline=None)
@given(COMBINATION, SEED, st.integers(1, 17))
def test_the_whole_shape_is_inside_every_frame_and_moves_evenly_as_the_caption_says(combination, seed, frames):
    _, x, y, radius = drawn_with(combination, seed, frames, 16)
    assert len(x) == frames
    assert (radius == radius[0]).all()
    assert 0.14 <= radius[0] <= 0.24
    assert (np.minimum(x, y) - radius).min() >= -1e-9
    assert (np.maximum(x, y) + radius).max() <= 1 + 1e-9
    if frames > 1:
        velocity = np.diff(np.stack([x, y], -1), axis=0)
        np.testing.assert_allclose(velocity, np.broadcast_to(velocity[0], velocity.shape), atol=1e-9)
        travel = velocity.sum(0) @ STEPS[combination.direction]
        np.testing.assert_allclose(velocity.sum(0), travel * np.array(STEPS[combination.direction]), atol=1e-9)
        assert 0.25 - 1e-9 <= travel <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None)
@given(COMBINATION, SEED)
def test_the_pixels_are_black_the_colour_or_between(combination, seed):
    clip, x, y, radius = drawn_with(combination, seed, 5, 32)
    assert clip.shape == (5, 32, 32, 3)
    assert clip.dtype == np.uint8
    colour = np.array(COLOURS[combination.colour])
    shares = clip.max(-1) / colour.max()
    assert np.abs(clip - shares[..., None] * colour).max() <= 1  # rounding, in two channels
    for frame, share in enumerate(shares):
        twin = supersampled(combination.shape, x[frame] * 32, y[frame] * 32, radius[frame] * 32, 32, n=8)
        assert np.abs(share - twin).max() < 0.45
        # None of it is cut off by the frame's edge.
        assert abs(share.sum() / twin.sum() - 1) < 0.07


@settings(max_examples=20, deadline=None)
@given(COMBINATION, SEED)
def test_the_generator_is_all_that_is_random(combination, seed):
    first, again, other = (draw(combination, np.random.default_rng(s), 5, 16) for s in (seed, seed, seed + 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_places_sizes_and_speeds_vary():
    placed = [drawn_with(COMBINATIONS[0], seed, 2, 16)[1:] for seed in range(200)]
    for values in (
        np.array([x[0] for x, _, _ in placed]),
        np.array([y[0] for _, y, _ in placed]),
        np.array([radius[0] for _, _, radius in placed]),
        np.array([abs(x[1] - x[0]) for x, _, _ in placed]),
    ):
        assert values.std() > 0.02


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_a_source_has_an_entry_for_each_combination_of_its_split(split):
    source = DrawnClips(split, (ClipShape(3, 16, 16),))
    assert source.captions == [combination.caption for combination in combinations(split)]
    assert len(source) == len(source.captions)
    for index in (0, len(source) - 1):
        entry = source.sample(index, np.random.default_rng(5))
        assert entry["caption"] == source.captions[index]
        expected = draw(combinations(split)[index], np.random.default_rng(5), 3, 16)
        np.testing.assert_array_equal(entry["video"], expected)


def test_an_image_is_a_clip_of_one_frame():
    clip = DrawnClips("train", (ClipShape(1, 16, 16),)).sample(0, np.random.default_rng(0))["video"]
    assert clip.shape == (1, 16, 16, 3)
    assert clip.max() == 255
