"""The inception score (Salimans et al. 2016), of images or, with C3D's classes, of video."""

import itertools

import numpy as np
from jaxtyping import Float


def inception_score(
    logits: Float[np.ndarray, "n classes"], splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | sample) from its split's mean, over splits; in float64.

    Args:
        logits: of a classifier, at least as many samples as splits.
        splits: consecutive parts; each has its own score.
        seed: of the shuffle before, torch-fidelity's by default; None keeps the order.

    Returns:
        (mean, population standard deviation) of the splits' scores; each is in [1, classes].

    Raises:
        ValueError: if there are fewer samples than splits.
    """
    logits = np.asarray(logits, np.float64)
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples can't be divided into {splits} splits")
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    bounds = [len(logits) * part // splits for part in range(splits + 1)]
    scores = []
    for start, stop in itertools.pairwise(bounds):
        part = log_p[start:stop]
        marginal = np.exp(part).mean(axis=0, keepdims=True)
        # Where p underflows to 0 the marginal may too; p log p is 0 there.
        log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
        scores.append(np.exp((np.exp(part) * (part - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
