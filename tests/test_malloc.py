"""Freed memory is asked of the system once."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from walt_jax.malloc import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(10_000_000)
    np.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """How many pages the second of two equal pieces of work asks the system for."""
    out = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if out.returncode == 77:
        pytest.skip("malloc is not glibc's")
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


def test_memory_that_was_freed_is_used_again():
    assert faults("keep") < 0.1 * faults("as it is")
