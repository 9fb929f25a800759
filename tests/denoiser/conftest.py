"""For tests of many small programs."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiling takes most of the time there, and nothing is long enough to be worth XLA's slower passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
