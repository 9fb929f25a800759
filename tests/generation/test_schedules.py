"""FDM's schedules against tables that the authors' code printed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.errors import UserError
from walt_jax.generation.schedules import Lengths, picture, schedule

SMALL = Lengths(16, 2, 6, 3)
TABLES = {
    "autoreg": [([0, 1], [2, 3, 4]), ([2, 3, 4], [5, 6, 7])],
    "long-range": [([0, 1], [2, 3, 4]), ([0, 1, 4], [5, 6, 7]), ([0, 1, 7], [8, 9, 10])],
    "hierarchy-2": [
        ([0, 0, 1], [2, 8, 15]), ([1, 2, 8], [3, 4, 5]), ([5, 8, 15], [6, 7, 9]), ([8, 9, 15], [10, 11, 12]),
        ([11, 12, 15], [13, 14]),
    ],
    "hierarchy-3": [
        ([0, 0, 1], [2, 8, 15]), ([2, 8, 15], [4, 6, 9]), ([8, 9, 15], [11, 13]), ([1, 2, 4, 6], [3, 5]),
        ([6, 8, 9, 11], [7, 10]), ([11, 13, 15], [12, 14]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_stages_are_the_authors(name):
    found = [tuple(stage) for stage in schedule(name, SMALL)]
    assert found[: len(TABLES[name])] == TABLES[name]
    if name.startswith("hierarchy"):
        assert len(found) == len(TABLES[name])


@pytest.mark.parametrize(
    ("name", "stages"), [("autoreg", 27), ("long-range", 27), ("hierarchy-2", 27), ("hierarchy-3", 28)]
)
def test_as_many_stages_as_the_authors_for_300_frames(name, stages):
    assert len(list(schedule(name, Lengths(300, 36, 20, 10)))) == stages


def embed(frame):
    return np.array([np.cos(frame), np.sin(3 * frame)])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*TABLES, "hierarchy-5", "adaptive-autoreg", "adaptive-hierarchy-2"]),
    st.integers(2, 60), st.integers(0, 12), st.integers(2, 12), st.data(),
)  # fmt: skip
def test_each_frame_is_made_once_from_what_is_there(name, frames, given_frames, call, data):
    lengths = Lengths(frames, min(given_frames, frames - 1), call, data.draw(st.integers(1, call - 1)))
    there = set(range(lengths.given))
    for number, stage in enumerate(schedule(name, lengths, embed)):
        assert set(stage.observed) <= there
        assert stage.made and not there & set(stage.made) and len(set(stage.made)) == len(stage.made)
        assert len(stage.observed) + len(stage.made) <= call
        assert stage.observed or (number == 0 and not lengths.given)
        there |= set(stage.made)
    assert there == set(range(frames))


def test_adaptive_schedules_observe_what_is_farthest():
    places = [0.0, 0.1, 5.0, 5.1, 9.0]
    stages = list(schedule("adaptive-autoreg", Lengths(6, 5, 4, 1), lambda frame: np.array([places[frame]])))
    assert stages[0].observed == [0, 2, 4]  # the newest; the farthest from it; the one farthest from both


@pytest.mark.parametrize("name", ["hierarchy", "hierarchy-1", "mixed", "adaptive-long-range"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="is no schedule"):
        list(schedule(name, SMALL, embed))
    with pytest.raises(UserError, match="can't be"):
        list(schedule("autoreg", Lengths(10, 2, 4, 4)))


def test_the_picture_shows_what_is_observed_and_made():
    pixels = np.asarray(picture(list(schedule("autoreg", SMALL)), 16, cell=4))
    colours = {
        name: pixels[2, 4 * frame + 2].tolist() for name, frame in {"observed": 1, "made": 3, "empty": 9}.items()
    }
    assert len({tuple(colour) for colour in colours.values()}) == 3
