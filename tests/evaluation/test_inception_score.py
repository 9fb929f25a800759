"""The inception score in closed form, and against its definition."""

import numpy as np
import pytest

from walt_jax.evaluation.inception_score import inception_score


def test_certain_and_balanced_classes_score_their_number():
    logits = 1000 * np.eye(5)[np.arange(40) % 5]
    assert inception_score(logits, splits=2, seed=None) == (pytest.approx(5), pytest.approx(0, abs=1e-9))


def test_equal_samples_score_1():
    logits = np.tile(np.array([[0.3, -1, 2]]), (30, 1))
    assert inception_score(logits)[0] == pytest.approx(1, abs=1e-12)


def test_equals_its_definition():
    logits = np.random.default_rng(0).normal(size=(23, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[:7], p[7:15], p[15:]):
        q = part.mean(0)
        scores.append(np.exp(np.mean([sum(a * np.log(a / b) for a, b in zip(row, q, strict=True)) for row in part])))
    assert inception_score(logits, 3, seed=None) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    shuffled = inception_score(logits, 3, seed=1)
    assert shuffled == inception_score(logits, 3, seed=1) != inception_score(logits, 3, seed=None)


def test_needs_a_sample_a_split():
    with pytest.raises(ValueError, match="3 samples"):
        inception_score(np.zeros((3, 2)))
