"""The Fréchet distance against closed forms, matrix roots and the references' routines."""

import numpy as np
import pytest
import scipy.linalg

from walt_jax.evaluation.frechet import Moments, frechet_distance, frechet_infinity, moments, over_folds, too_few


def gaussian(mean, covariance):
    return Moments(np.asarray(mean, float), np.asarray(covariance, float), 1000)


def features(count, dimension, seed, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension))


def tf1(one, other):
    """google-research's frechet_classifier_distance_from_activations: roots by SVD, small values kept as they are."""

    def root(matrix):
        u, s, vt = np.linalg.svd(matrix)
        return u @ np.diag(np.where(s < 1e-10, s, np.sqrt(s))) @ vt

    sigma = root(other.covariance)
    trace = np.trace(root(sigma @ one.covariance @ sigma))
    total = np.trace(one.covariance) + np.trace(other.covariance) - 2 * trace
    return total + np.square(one.mean - other.mean).sum()


def sqrtm(one, other):
    """StyleGAN-V's and pytorch-fid's: the root of the product."""
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    return np.square(one.mean - other.mean).sum() + np.trace(one.covariance + other.covariance - 2 * root)


def test_scalar_gaussians():
    """In one dimension it is (μ₁ - μ₂)² + (σ₁ - σ₂)²."""
    assert frechet_distance(gaussian([1], [[4]]), gaussian([3], [[25]])) == pytest.approx(4 + 9, rel=1e-12)


def test_commuting_covariances():
    """With one basis it is the sum over the axes."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    first, second = np.array([1.0, 4, 9, 16, 0]), np.array([4.0, 4, 1, 0, 25])
    one, other = (gaussian(np.zeros(5), basis @ np.diag(values) @ basis.T) for values in (first, second))
    expected = np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-10)


def test_equal_sets_have_distance_0_also_where_the_covariance_is_singular():
    for count in (40, 10):
        same = moments(features(count, 20, 0), 1)
        assert abs(frechet_distance(same, same)) < 1e-9 * np.trace(same.covariance)


@pytest.mark.parametrize("reference", [tf1, sqrtm])
def test_equals_the_references_routines(reference):
    one = moments(features(60, 12, 1), 1)
    other = moments(features(50, 12, 2, shift=0.3), 1)
    assert frechet_distance(one, other) == pytest.approx(reference(one, other), rel=1e-9)


def test_tf1_differs_by_no_more_than_is_stated_where_covariances_are_singular():
    one, other = moments(features(10, 30, 1), 1), moments(features(12, 30, 2), 1)
    assert abs(frechet_distance(one, other) - tf1(one, other)) < 2e-5 * 30


@pytest.mark.parametrize("ddof", [0, 1])
def test_moments_are_numpys_in_float64(ddof):
    values = features(9, 4, 3).astype(np.float32) + np.float32(1000)
    found = moments(values, ddof)
    np.testing.assert_allclose(found.covariance, np.cov(values.astype(float), rowvar=False, ddof=ddof), rtol=1e-12)
    np.testing.assert_allclose(found.mean, values.astype(float).mean(0), rtol=1e-14)
    assert found.count == 9


def test_moments_need_enough_finite_features():
    with pytest.raises(ValueError, match="1 features"):
        moments(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[0.0], [np.nan], [1.0]]), 1)


def test_extrapolation_removes_the_bias_of_few_samples():
    """Between samples of one distribution the distance is positive; at infinity it is 0, on average over draws."""
    rng = np.random.default_rng(0)
    reference = moments(rng.normal(size=(200_000, 8)), 1)
    draws = [rng.normal(size=(1000, 8)) for _ in range(20)]
    biased = np.mean([frechet_distance(moments(few, 1), reference) for few in draws])
    assert biased > 0.01
    assert abs(np.mean([frechet_infinity(reference, few, 1) for few in draws])) < biased / 5


def test_extrapolation_is_the_intercept_of_a_line(monkeypatch):
    """Of distances 5 + 7 / n it is 5."""
    monkeypatch.setattr("walt_jax.evaluation.frechet.moments", lambda x, ddof: len(x))
    monkeypatch.setattr("walt_jax.evaluation.frechet.frechet_distance", lambda n, reference: 5 + 7 / n)
    assert frechet_infinity(None, np.zeros((300, 2)), 1) == pytest.approx(5)


def test_folds_are_disjoint_and_complete():
    seen = []
    mean, std = over_folds(lambda x: seen.append(x) or float(len(seen)), np.arange(8.0)[:, None], 4)
    assert sorted(np.concatenate(seen)[:, 0]) == list(range(8))
    assert (mean, std) == (2.5, pytest.approx(np.std([1, 2, 3, 4])))


def test_a_warning_below_the_dimension():
    assert too_few((500, 401), 400) is None
    assert "400 samples" in too_few((500, 400), 400)
