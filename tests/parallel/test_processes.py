"""Flags of several processes, what they exchange, and that one process needs none of it."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.parallel import processes


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("host:1234", None, None), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("host", 2, 0), r"--coordinator=host is no HOST:PORT, such as"),
        (("host:0", 2, 0), r"--coordinator=host:0 is no HOST:PORT"),
        (("host:1234", 2, 2), "--process_id=2 should be from 0 to 1, as --num_processes is 2"),
    ],
)
def test_wrong_flags_are_sentences(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        processes.initialise(*flags)


def test_states_of_processes_are_one_if_they_agree():
    assert processes.merged([{"a": {"0": 1}}, {"a": {"1": [2]}}, {"a": {"0": 1}}]) == {"a": {"0": 1, "1": [2]}}
    with pytest.raises(RuntimeError, match="processes disagree: 1 and 2"):
        processes.merged([{"a": 1}, {"a": 2}])


def test_one_process_waits_for_nobody():
    assert processes.is_first() and processes.exchanged({"x": 1}) == [{"x": 1}]
    assert processes.agreed_stop(15, "stage", 3) == 15 and processes.agreed_stop(0, "stage", 3) == 0
    with processes.one_after_the_first() as first:
        assert first
    np.testing.assert_array_equal(processes.fetched(np.arange(3)), [0, 1, 2])
