"""Squared maximum mean discrepancy under a polynomial kernel: the one routine of KVD, KID and JEDi."""

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]
BLOCK = 2048  # samples


def kernel_distance(
    one: Features, other: Features, degree: int = 3, coefficient: float = 1.0, biased: bool = False
) -> float:
    """MMD² under (x·y / d + coefficient) ^ degree, in float64 (Bińkowski et al. 2018, equation 4; Gretton et al. 2012).

    Args:
        one, other: features, at least 2 each.
        degree, coefficient: of the kernel: 3 and 1 for KID and KVD, 2 and 0 for JEDi.
        biased: whether a sample's kernel with itself counts, as in JEDi.

    Returns:
        0 in expectation for samples of one distribution if unbiased, in which case it can be negative.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)

    def total(x: Features, y: Features) -> float:
        """The sum over all pairs, by blocks: the whole matrix of 50,000 samples has 20 GB."""
        blocks = (x[start : start + BLOCK] for start in range(0, len(x), BLOCK))
        return float(sum(((block @ y.T / x.shape[1] + coefficient) ** degree).sum() for block in blocks))

    def within(x: Features) -> float:
        count = len(x)
        if biased:
            return total(x, x) / count**2
        own = float(((np.square(x).sum(axis=1) / x.shape[1] + coefficient) ** degree).sum())
        return (total(x, x) - own) / (count * (count - 1))

    return within(one) + within(other) - 2 * total(one, other) / (len(one) * len(other))


def subset_kernel_distance(
    one: Features, other: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID: mean and standard deviation of the unbiased `kernel_distance` over random subsets without replacement.

    Args:
        one, other: features, at least `size` each.
        subsets, size, seed: as in torch-fidelity, but with NumPy's newer random generator.

    Raises:
        ValueError: if there are fewer features than `size`.
    """
    if min(len(one), len(other)) < size:
        raise ValueError(f"subsets of {size} do not fit in {min(len(one), len(other))} features")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        chosen = [x[rng.choice(len(x), size, replace=False)] for x in (one, other)]
        values.append(kernel_distance(*chosen))
    return float(np.mean(values)), float(np.std(values))
