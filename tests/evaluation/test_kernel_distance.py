"""The kernel distance against its definition, pair by pair."""

import numpy as np
import pytest

from walt_jax.evaluation.kernel_distance import kernel_distance, subset_kernel_distance


def features(count, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, 5))


def twin(one, other, degree, coefficient, biased):
    def mean(x, y, skip):
        values = [
            (float(np.dot(a, b)) / len(a) + coefficient) ** degree
            for i, a in enumerate(x)
            for j, b in enumerate(y)
            if not (skip and i == j)
        ]
        return sum(values) / len(values)

    return mean(one, one, not biased) + mean(other, other, not biased) - 2 * mean(one, other, False)


@pytest.mark.parametrize("block", [4, 2048])
@pytest.mark.parametrize(("degree", "coefficient", "biased"), [(3, 1.0, False), (2, 0.0, True)])
def test_equals_its_definition(monkeypatch, degree, coefficient, biased, block):
    monkeypatch.setattr("walt_jax.evaluation.kernel_distance.BLOCK", block)
    one, other = features(7, 0), features(6, 1, 0.5)
    expected = twin(one, other, degree, coefficient, biased)
    assert kernel_distance(one, other, degree, coefficient, biased) == pytest.approx(expected, rel=1e-12)


def test_is_unbiased():
    """Over many draws of one distribution the mean is 0 within its error; the biased one's is not."""
    values = [kernel_distance(features(6, 2 * k), features(6, 2 * k + 1)) for k in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert np.mean([kernel_distance(features(6, k), features(6, -1 - k & 0xFFFF), biased=True) for k in range(200)]) > 1


def test_subsets_of_all_features_are_the_whole():
    one, other = features(20, 0), features(20, 1, 1.0)
    mean, std = subset_kernel_distance(one, other, subsets=3, size=20)
    assert (mean, std) == (pytest.approx(kernel_distance(one, other)), pytest.approx(0, abs=1e-12))
    assert subset_kernel_distance(one, other, subsets=20, size=10)[1] > 0
    with pytest.raises(ValueError, match="subsets of 30"):
        subset_kernel_distance(one, other, size=30)
