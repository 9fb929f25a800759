"""The judge tells every drawn clip, whatever it went through, and accepts nothing that is no clear instance."""

import itertools

import numpy as np
import pytest

from walt_jax.data.drawn import COLOURS, COMBINATIONS, DIRECTIONS, SHAPES, Combination, coverage, draw
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.evaluation.judge import Verdict, judge

FRAMES = 17
WORDS = ("colour", "shape", "direction")
sizes = pytest.mark.parametrize("size", [32, 64])


def clips(size, seeds=1):
    for index, combination in enumerate(COMBINATIONS):
        for seed in range(seeds):
            yield combination, draw(combination, np.random.default_rng([index, seed]), FRAMES, size)


def seen(verdict):
    return tuple(getattr(verdict, word) for word in WORDS)


def words(combination):
    return tuple(getattr(combination, word) for word in WORDS)


@sizes
def test_every_drawn_clip_is_told(size):
    wrong = [(c, verdict) for c, clip in clips(size, 5) if seen(verdict := judge(clip)) != words(c)]
    assert wrong == []


@sizes
def test_every_drawn_clip_is_told_after_a_round_trip_through_a_file(tmp_path, size):
    wrong = []
    for combination, clip in clips(size):
        write_video(tmp_path / "clip.mp4", clip, 8)
        verdict = judge(read_clip(tmp_path / "clip.mp4", 8))
        wrong += [(combination, verdict)] if seen(verdict) != words(combination) else []
    assert wrong == []


@pytest.mark.parametrize("kind", ["noisy", "blurred", "dim", "offset"])
def test_the_flaws_of_a_sample_do_not_matter(kind):
    rng = np.random.default_rng(0)
    flawed = {
        "noisy": lambda x: x + rng.normal(0, 12, x.shape),
        "blurred": lambda x: sum(np.roll(x, shift, (1, 2)) for shift in itertools.product((-1, 0, 1), repeat=2)) / 9,
        "dim": lambda x: 0.8 * x,
        "offset": lambda x: x + 8,
    }[kind]
    told = [
        seen(judge(np.clip(flawed(clip.astype(float)), 0, 255).astype(np.uint8))) == words(c) for c, clip in clips(32)
    ]
    assert np.mean(told) > 0.95


def test_a_wrong_word_is_told_and_the_right_ones_are_not():
    for combination, clip in clips(32):
        verdict = judge(clip)
        for word, values in zip(WORDS, (COLOURS, SHAPES, DIRECTIONS), strict=True):
            for value in set(values) - {getattr(combination, word)}:
                other = Combination(**{**vars(combination), word: value})
                assert verdict.right(other) == {w: w != word for w in WORDS}


def test_what_is_unclear_is_right_for_no_caption():
    for combination in COMBINATIONS:
        assert Verdict(None, None, None).right(combination) == dict.fromkeys(WORDS, False)


def path(start, end, frames=FRAMES):
    return [np.add(np.multiply(start, 1 - s), np.multiply(end, s)) for s in np.linspace(0, 1, frames)]


LEFT_TO_RIGHT = path((0.3, 0.5), (0.7, 0.5))


def paint(shapes, colours, centres, radius=0.2, size=32):
    """A clip of one shape; shape and colour are one for all frames, or one for each."""
    shapes = [shapes] * len(centres) if isinstance(shapes, str) else shapes
    colours = [colours] * len(centres) if isinstance(colours, str) else colours
    return np.stack(
        [
            np.round(coverage(shape, *(centre * size), radius * size, size)[..., None] * np.array(COLOURS[colour]))
            for shape, colour, centre in zip(shapes, colours, centres, strict=True)
        ]
    ).astype(np.uint8)


def accepted(clip):
    """Some caption would be wholly right."""
    return None not in seen(judge(clip))


def test_the_painted_clip_that_the_next_ones_spoil_is_accepted():
    assert seen(judge(paint("circle", "red", LEFT_TO_RIGHT))) == ("red", "circle", "right")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "centres",
    {
        "static": path((0.5, 0.5), (0.5, 0.5)),
        "barely moving": path((0.48, 0.5), (0.52, 0.5)),
        "diagonal": path((0.3, 0.3), (0.7, 0.7)),
        "other diagonal": path((0.3, 0.7), (0.7, 0.3)),
        "steep": path((0.3, 0.3), (0.5, 0.7)),
        "back and forth": path((0.3, 0.5), (0.7, 0.5), 9) + path((0.7, 0.5), (0.3, 0.5), 8),
        "there and half way back": path((0.3, 0.5), (0.7, 0.5), 9) + path((0.7, 0.5), (0.5, 0.5), 8),
        "jumping about": [np.random.default_rng(frame).uniform(0.25, 0.75, 2) for frame in range(FRAMES)],
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else item,
)
def test_other_motion_is_not_accepted(shape, centres):
    assert judge(paint(shape, "yellow", centres[1])).direction is None


@pytest.mark.parametrize("pair", list(itertools.permutations(SHAPES, 2)), ids="-".join)
def test_a_shape_that_becomes_another_is_not_accepted(pair):
    first, second = pair
    for share in (4, 8, 12):
        shapes = [first] * share + [second] * (FRAMES - share)
        assert not accepted(paint(shapes, "green", LEFT_TO_RIGHT))
    before, after = (paint(shape, "green", LEFT_TO_RIGHT) for shape in pair)
    share = np.linspace(0, 1, FRAMES)[:, None, None, None]
    assert not accepted(np.round((1 - share) * before + share * after).astype(np.uint8))


@pytest.mark.parametrize("pair", list(itertools.combinations(COLOURS, 2)), ids="-".join)
def test_a_colour_that_becomes_another_is_not_accepted(pair):
    first, second = pair
    for share in (5, 8, 12):
        assert not accepted(paint("square", [first] * share + [second] * (FRAMES - share), LEFT_TO_RIGHT))


@pytest.mark.parametrize("colours", [("red", "red"), ("red", "green"), ("blue", "purple"), ("white", "white")])
@pytest.mark.parametrize("shapes", [("circle", "circle"), ("square", "triangle"), ("circle", "square")])
def test_two_shapes_are_not_accepted(colours, shapes):
    above, below = path((0.3, 0.25), (0.7, 0.25)), path((0.3, 0.75), (0.7, 0.75))
    for second in (below, below[::-1]):
        parts = zip(shapes, colours, (above, second), strict=True)
        clip = np.maximum(*(paint(shape, colour, centres) for shape, colour, centres in parts))
        assert not accepted(clip)


def test_a_shape_that_comes_and_goes_is_not_accepted():
    clip = paint("circle", "red", LEFT_TO_RIGHT)
    clip[5:8] = 0
    assert not accepted(clip)


@pytest.mark.parametrize("radius", [0.05, 0.4])
def test_other_sizes_are_not_accepted(radius):
    assert not accepted(paint("square", "white", path((0.41, 0.5), (0.59, 0.5)), radius))


def test_what_is_no_shape_is_not_accepted():
    rng = np.random.default_rng(0)
    shape = (FRAMES, 32, 32, 3)
    for clip in (
        np.zeros(shape),
        np.full(shape, 255),
        np.full(shape, 100),
        rng.integers(0, 256, shape),
        rng.integers(0, 60, shape),
        np.where(
            np.arange(32)[None, None, :, None] < 16 + 0.5 * np.arange(FRAMES)[:, None, None, None], (255, 0, 0), 0
        ),
    ):
        assert not accepted(np.broadcast_to(clip, shape).astype(np.uint8))


def test_an_image_moves_nowhere():
    assert seen(judge(paint("circle", "red", LEFT_TO_RIGHT)[:1])) == ("red", "circle", None)
