"""Attention on packs over eight devices equals that on one, gradients too, and moves no tokens between devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("packs_on_eight_devices.py")


@pytest.fixture(scope="module")
def found(cache):
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    done = subprocess.run([sys.executable, SCRIPT], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_equals_that_on_one_device(found):
    """Of windows, text and isolated images: outputs, and gradients of parameters, tokens and text."""
    assert len(found["worst"]) == 3
    assert all(value < 1e-5 for value, _ in found["worst"].values()), found["worst"]


def test_only_gradients_of_parameters_cross_data_shards(found):
    """No gather and no exchange of tokens; all that is reduced are sums over tokens, for parameters."""
    assert set(found["kinds"]["data 4 × fsdp 2"]) == {"all-reduce"}
    assert found["largest"]["data 4 × fsdp 2"] < found["tokens"]
