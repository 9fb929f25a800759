"""Groups of frames: what a schedule asks for is drawn, and never more than a call has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.frame_groups import frame_groups


@settings(deadline=None, max_examples=100)
@given(total=st.integers(1, 40), most=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_frames_are_some_of_the_clip_and_at_least_one_is_made(total, most, seed):
    frames, observed = frame_groups(total, most, np.random.default_rng(seed))
    assert 1 <= len(frames) <= most and len(observed) == len(frames)
    assert frames[0] >= 0 and frames[-1] < total and (np.diff(frames) > 0).all()
    assert not observed.all()


def test_runs_gaps_and_what_comes_later_are_all_drawn():
    drawn = [frame_groups(17, 5, np.random.default_rng(seed)) for seed in range(3000)]
    spans = np.array([frames[-1] - frames[0] + 1 for frames, _ in drawn])
    counts = np.array([len(frames) for frames, _ in drawn])
    assert (spans[counts == 5] == 5).mean() > 0.02  # a window without gaps
    assert (spans >= 15).mean() > 0.1  # all over the clip
    assert counts.mean() > 3.5
    seen = np.concatenate([observed for _, observed in drawn]).mean()
    assert 0.1 < seen < 0.5  # the first group is made, of the others half
    assert np.mean([o[0] and not o[-1] for _, o in drawn]) > 0.05  # going on
    assert np.mean([o[0] and o[-1] for _, o in drawn]) > 0.02  # in between
    every = np.bincount(np.concatenate([frames for frames, _ in drawn]), minlength=17)
    assert every.min() > 0.5 * every.mean()


@pytest.mark.parametrize("total", [1, 3, 5])
def test_clips_as_short_as_a_call_are_whole_at_times(total):
    drawn = [frame_groups(total, 5, np.random.default_rng(seed)) for seed in range(100)]
    assert max(len(frames) for frames, _ in drawn) == total
