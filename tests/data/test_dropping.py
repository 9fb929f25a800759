"""Token dropping: rates have the requested mean, kept tokens are a sorted subset of the clip's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walt_jax.data.dropping import DropConfig, drop_rate, kept_tokens


def rates(config, tokens=100, most=100, count=4000):
    return np.array([drop_rate(config, tokens, most, np.random.default_rng(seed)) for seed in range(count)])


def test_a_constant_rate_is_constant():
    assert set(rates(DropConfig(rate=0.3), count=10)) == {0.3}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_beta_rates_differ_around_their_mean(rate):
    found = rates(DropConfig(kind="beta", rate=rate))
    assert abs(found.mean() - rate) < 0.02
    assert found.std() > 0.05
    assert found.min() >= 0 and found.max() <= 1


def test_larger_clips_lose_more():
    config = DropConfig(kind="resolution", rate=0.5, slope=0.3)
    assert abs(rates(config, 100).mean() - 0.8) < 0.01
    assert abs(rates(config, 50).mean() - 0.5) < 0.01
    assert abs(rates(config, 1).mean() - 0.2) < 0.02


@given(tokens=st.integers(1, 200), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_what_is_kept_is_a_part_in_order(tokens, rate, seed):
    kept = kept_tokens(tokens, rate, np.random.default_rng(seed))
    assert len(kept) == max(1, round(tokens * (1 - rate)))
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0 and kept[-1] < tokens


def test_every_token_is_kept_as_often():
    counts = np.bincount(
        np.concatenate([kept_tokens(10, 0.5, np.random.default_rng(seed)) for seed in range(2000)]), minlength=10
    )
    assert counts.min() > 900 and counts.max() < 1100


def test_rates_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="should lie between 0 and 1"):
        DropConfig(kind="resolution", rate=0.2, slope=0.3)
    with pytest.raises(ValueError, match="slope is for kind='resolution'"):
        DropConfig(kind="beta", rate=0.2, slope=0.3)
