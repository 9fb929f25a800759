"""The Fréchet distance of two sets of features, each taken as a Gaussian: the one routine of FVD, FID and others."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]
INFINITY_SIZES = 15  # subsets that are extrapolated from, as in dgm-eval


class Moments(NamedTuple):
    """A Gaussian that is fitted to features.

    Attributes:
        mean: float64.
        covariance: float64.
        count: how many features it was fitted to.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    count: int


def moments(features: Features, ddof: int) -> Moments:
    """Mean and covariance in float64.

    Args:
        features: at least ddof + 1 of them, finite.
        ddof: the covariance is divided by n - ddof: 1 in google-research's FVD and pytorch-fid, 0 in StyleGAN-V's.

    Raises:
        ValueError: if there are too few features, or one is not finite.
    """
    features = np.asarray(features, np.float64)
    if len(features) <= ddof:
        raise ValueError(f"{len(features)} features have no covariance that is divided by n - {ddof}")
    if not np.isfinite(features).all():
        raise ValueError("a feature is not finite")
    mean = features.mean(axis=0)
    centred = features - mean[None]
    return Moments(mean, centred.T @ centred / (len(features) - ddof), len(features))


def frechet_distance(one: Moments, other: Moments) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), Dowson and Landau 1982; in float64.

    The eigenvalues of (Σ₁Σ₂)^½ are the singular values of Σ₁^½ Σ₂^½. Computed so they are real and not negative for
    singular covariances too, where a general matrix root needs a real part or a small multiple of the identity added.
    google-research's FVD keeps a singular value s < 1e-10 as s where its root is due, which changes the distance by at
    most 2e-5 for each dimension.

    Returns:
        A distance (squared units of the features), not negative but for rounding.
    """
    difference = one.mean - other.mean
    cross = np.linalg.svd(_root(one.covariance) @ _root(other.covariance), compute_uv=False).sum()
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root of a positive semidefinite matrix.

    Eigenvalues within rounding of 0 are 0: the root of an error of 1e-15 would be one of 3e-8.
    """
    values, vectors = np.linalg.eigh(covariance)
    error = len(values) * np.finfo(values.dtype).eps * np.abs(values).max()
    return (vectors * np.sqrt(np.where(values > error, values, 0))[None]) @ vectors.T


def frechet_infinity(reference: Moments, features: Features, ddof: int, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to infinitely many generated samples (Chong and Forsyth 2020).

    The distance of n samples is biased upward by about c / n. Distances of random subsets of 15 sizes from a tenth
    (at most 5000) to all are regressed on 1 / n; the intercept is returned. The reference's own bias remains.

    Args:
        reference: of the real features.
        features: of the generated samples, at least 20.
        ddof: as in `moments`.
        seed: of the subsets.
    """
    rng = np.random.default_rng(seed)
    sizes = np.linspace(min(5000, max(len(features) // 10, 2)), len(features), INFINITY_SIZES).astype(int)
    distances = [
        frechet_distance(moments(features[rng.permutation(len(features))[:size]], ddof), reference) for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def over_folds(measure: Callable[[Features], float], features: Features, count: int = 4) -> tuple[float, float]:
    """Mean and standard deviation of a measure over disjoint folds of the generated features.

    Disjoint, because duplicates, as a bootstrap draws them, change the covariance.
    """
    values = [measure(features[fold::count]) for fold in range(count)]
    return float(np.mean(values)), float(np.std(values))


def too_few(counts: tuple[int, int], dimension: int) -> str | None:
    """A warning if a covariance of so many samples is singular."""
    if min(counts) > dimension:
        return None
    return (
        f"{min(counts)} samples do not determine a covariance of {dimension} dimensions: the distance is biased "
        "upward, compare it only with distances of as many samples"
    )
