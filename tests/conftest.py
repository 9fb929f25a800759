"""For all tests: arrays of different rank are never broadcast silently; programs are compiled once."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The main jobs, which take minutes each, come first: a file goes to one process as a whole."""
    items.sort(key=lambda item: item.path.parent != pathlib.Path(__file__).parent)


@pytest.fixture(scope="module")
def quick_compilation():
    """For many small programs: compiling takes most of the time, and none is long enough for XLA's slower passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """Where commands keep what they compile; processes that share the tests share it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    path.mkdir(exist_ok=True)
    return path
