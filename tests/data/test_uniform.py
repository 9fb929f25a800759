"""Random numbers of many generators at once are NumPy's own, to the last bit."""

import numpy as np
import pytest

from walt_jax.data.uniform import uniform


@pytest.mark.parametrize("before, after", [([0], []), ([2**31 + 5], [1]), ([], []), ([1, 2, 3], [4, 5]), ([2**40], [])])
def test_they_are_those_of_a_generator_each(before, after):
    numbers = [0, 1, 2**32 - 1, *np.random.default_rng(0).integers(0, 2**32, 60).tolist()]
    expected = [np.random.default_rng([*before, number, *after]).random() for number in numbers]
    np.testing.assert_array_equal(uniform(before, numbers, after), expected)


def test_numbers_of_more_than_32_bits_have_theirs_too():
    numbers = [3, 2**32, 2**33 + 1]
    np.testing.assert_array_equal(uniform([7], numbers), [np.random.default_rng([7, n]).random() for n in numbers])
