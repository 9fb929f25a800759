"""For all tests: arrays of different rank are never broadcast silently; programs are compiled once."""

import fcntl
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import commands
import jax
import pytest

from walt_jax.malloc import collect_seldom

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {commands.quick_flags()}".strip()
)  # read at the first program
jax.config.update("jax_numpy_rank_promotion", "raise")
collect_seldom()


# Where minutes are spent, the longest first; while the first trains `tiny_run`, nobody should wait for it.
LONGEST = ("test_run.py", "test_tokenizer_run.py", "parallel/test_mesh_equality.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then the other main jobs: a file goes to one process as a whole."""
    folder = pathlib.Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(LONGEST)), item.path.parent != folder))


@pytest.fixture(scope="module")
def quick_compilation():
    """For many small programs: compiling takes most of the time, and none is long enough for XLA's slower passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def golden_script() -> Callable[[str], types.ModuleType]:
    """Imports a script of `golden/` by its name: what it makes its inputs of is what tests compare."""

    def load(name: str) -> types.ModuleType:
        path = pathlib.Path(__file__).parent / "golden" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """Where commands keep what they compile; processes that share the tests share it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def tiny_run(cache) -> pathlib.Path:
    """The workdir of a run of `walt_tiny` that nothing disturbed; one for all processes that share the tests."""
    workdir = cache.parent / "tiny"
    with (cache.parent / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait for the first
        if not (workdir / "report.html").exists():
            # As users run it, with all of XLA's optimizations.
            code, out, err = commands.run(commands.TINY, f"--workdir={workdir}", cache=cache, quick=False)
            assert code == 0, err
            assert "report.html" in out.splitlines()[-1]
    return workdir


@pytest.fixture(scope="session")
def on_eight_devices(cache) -> Callable[..., Any]:
    """Runs a script in a process that has eight virtual CPU devices: `(script, *arguments)` to the JSON it prints."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {commands.quick_flags()}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "TPU_SKIP_MDS_QUERY": "1",  # no TPU is asked which machine this is,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and two programs may be compiled for one at once
    }

    def run(script: pathlib.Path, *arguments: str) -> Any:
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
