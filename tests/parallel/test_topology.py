"""Names of topologies become devices, or a sentence; the table of hardware knows devices by their kind."""

import importlib.util
import types

import pytest

from walt_jax.errors import UserError
from walt_jax.parallel.hardware import HARDWARE, of_kind, peak
from walt_jax.parallel.topology import EXAMPLES, attached, topology


@pytest.mark.parametrize(
    ("name", "shape", "slices", "chips", "devices"),
    [
        ("v5e:4x4", (4, 4), 1, 16, 16),
        ("v5p:4x4x8", (4, 4, 8), 1, 128, 128),
        ("V6E:16x16", (16, 16), 1, 256, 256),
        ("2x v5e:16x16", (16, 16), 2, 512, 512),
        ("tpu7x:2x2x1", (2, 2, 1), 1, 4, 8),
        ("h100:8", (8,), 1, 8, 8),
        ("h200:8x4", (8,), 4, 32, 32),
        ("4x b200:8", (8,), 4, 32, 32),
    ],
)
def test_names(name, shape, slices, chips, devices):
    found = topology(name)
    assert (found.shape, found.slices, found.chips, found.device_count) == (shape, slices, chips, devices)
    assert found.platform == ("tpu" if found.hardware.torus_axes else "cuda")
    assert found.compiles or found.platform == "cuda"


def test_the_examples_are_names_and_there_is_one_of_each_kind():
    assert set(EXAMPLES) == set(HARDWARE)
    assert all(topology(example).name == example for example in EXAMPLES.values())


@pytest.mark.parametrize("name", ["v9:4x4", "v5e", "v5e:4x", "4x4", "0x v5e:4x4", "h100:0", "v5e:4x4 extra"])
def test_a_mistake_lists_what_there_is(name):
    with pytest.raises(UserError) as error:
        topology(name)
    assert f"--topology={name}" in str(error.value)
    assert all(example in str(error.value) for example in EXAMPLES.values())


@pytest.mark.parametrize(
    ("name", "remedy"), [("v5e:4x4x4", "2 sides, such as v5e:4x4"), ("h100:16", "such as h100:8x4")]
)
def test_a_wrong_number_of_sides_or_gpus_says_what_is_right(name, remedy):
    with pytest.raises(UserError, match=remedy):
        topology(name)


def test_without_libtpu_a_sentence_says_what_adds_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        topology("v5e:4x4").devices()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_libtpus_devices_are_of_the_table():
    for name, wrong in (("v5e:2x2", "v5e:3x3"), ("v5p:2x2x1", "v5p:3x1x1")):
        found = topology(name)
        devices = found.devices()
        assert len(devices) == found.device_count
        assert of_kind(devices[0].device_kind) is found.hardware
        assert attached(devices).shape == found.shape
        with pytest.raises(UserError, match="no slice that libtpu knows"):
            topology(wrong).devices()


@pytest.mark.skipif(not topology("h100:8").compiles, reason="needs jax-cuda12-plugin and jax-cuda12-pjrt, but no GPU")
@pytest.mark.parametrize("name", ["h100:8", "h200:8x4", "b200:4"])
def test_gpus_that_are_not_there_are_of_the_table(name):
    found = topology(name)
    devices = found.devices()
    assert [device.id for device in devices] == list(range(found.device_count))
    assert [device.process_index for device in devices] == [i // found.shape[0] for i in range(found.device_count)]
    assert of_kind(devices[0].device_kind) is found.hardware


def test_gpus_are_compiled_for_where_the_plugin_is(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there or None)
        assert topology("h100:8").compiles == there and topology("v5e:4x4").compiles


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
        ("TPU v4", "v4"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
    ],
)  # fmt: skip
def test_kinds_of_devices(kind, name):
    assert of_kind(kind) is HARDWARE[name]
    assert peak(kind) == HARDWARE[name].peak_flops


def test_a_cpu_has_no_stated_peak():
    assert peak("cpu") is None


def test_a_chip_of_two_devices_has_each_half():
    assert 2 * peak("TPU7x") == 2307e12


def test_attached_gpus_are_hosts_of_them_and_cpus_are_refused():
    gpus = [types.SimpleNamespace(device_kind="NVIDIA H100", process_index=i // 8) for i in range(16)]
    found = attached(gpus)
    assert (found.name, found.shape, found.slices) == ("h100:8x2", (8,), 2)
    with pytest.raises(UserError, match=r"--auto_mesh knows v4.*'cpu'.*set config\.mesh"):
        attached([types.SimpleNamespace(device_kind="cpu")])
