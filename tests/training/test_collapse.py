"""A collapse is told of once, when it has lasted."""

import pytest

from walt_jax.training.collapse import WINDOW, CollapseWatch


def told(watch, name, values):
    return [index for index, value in enumerate(values) if watch.update({name: value, "loss": 1.0})]


@pytest.mark.parametrize(("name", "bad", "good"), [("discriminator_accuracy", 1.0, 0.5), ("code_usage", 0.01, 0.9)])
def test_a_collapse_is_told_of_when_it_has_lasted_and_again_when_it_comes_back(name, bad, good):
    watch = CollapseWatch()
    assert told(watch, name, [good] * 2 * WINDOW) == []
    # The mean over the window has to be bad.
    assert told(watch, name, [bad] * 3 * WINDOW) == [WINDOW - 1]
    assert told(watch, name, [good] * WINDOW) == []
    assert told(watch, name, [bad] * 3 * WINDOW) == [WINDOW - 1]


def test_the_first_steps_are_no_collapse():
    assert told(CollapseWatch(), "code_usage", [0.0] * (WINDOW - 1)) == []


def test_the_sentence_has_the_figure_and_the_remedy():
    watch = CollapseWatch()
    sentences = [s for _ in range(WINDOW) for s in watch.update({"code_usage": 0.01, "discriminator_accuracy": 1.0})]
    assert len(sentences) == 2
    assert "1.000" in sentences[0] and "r1" in sentences[0]
    assert "0.010" in sentences[1] and "entropy" in sentences[1]
