"""Attention on packs over eight devices equals that on one, gradients too, and moves no tokens between devices."""

import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("packs_on_eight_devices.py")


@pytest.fixture(scope="module")
def found(on_eight_devices):
    return on_eight_devices(SCRIPT)


def test_it_equals_that_on_one_device(found):
    """Of windows, text and isolated images: outputs, and gradients of parameters, tokens and text."""
    assert len(found["worst"]) == 4
    assert all(value < 1e-5 for value, _ in found["worst"].values()), found["worst"]


def test_only_gradients_of_parameters_cross_data_shards(found):
    """No gather and no exchange of tokens; all that is reduced are sums over tokens, for parameters."""
    assert set(found["kinds"]["data 4 × fsdp 2"]) == {"all-reduce"}
    assert found["largest"]["data 4 × fsdp 2"] < found["tokens"]
