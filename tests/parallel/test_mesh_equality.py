"""Eight devices compute what one does, however the state and the batch are divided; all programs are in one process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("eight_devices.py")
TOLERANCE = 1e-5


def run(which, cache):
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "TPU_SKIP_MDS_QUERY": "1",  # no TPU is asked which machine this is,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and two programs may be compiled for one at once
    }
    done = subprocess.run([sys.executable, SCRIPT, which], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick(cache):
    return run("quick", cache)


def check(found):
    worst = {
        f"{case}: {part} of {array}": value
        for case, parts in found["equal"].items()
        for part, (value, array) in parts.items()
        if not value <= TOLERANCE
    }
    assert not worst


def test_ten_steps_are_those_of_one_device(quick):
    """Losses, the first gradients, parameters and their average."""
    assert len(quick["equal"]) == 5
    check(quick)


def test_samples_and_decoded_parts_are_those_of_one_device(quick):
    """Values near the middle between two levels may be rounded to either."""
    for videos in quick["videos"]:
        assert videos["shape"] == [8, 5, 16, 16, 3]
        assert videos["most"] <= 1 and videos["share"] < 1e-3


def test_checkpoints_move_between_meshes(quick):
    assert quick["restored"]


def test_a_divided_state_is_never_whole_on_a_device(quick):
    whole, divided = quick["largest"]
    assert divided < whole / 4


def test_activations_stay_where_they_are(quick):
    """FSDP gathers parameters and sums gradients, and moves nothing from device to device."""
    counts = quick["collectives"]["denoiser, fsdp"]
    assert not {"all-to-all", "collective-permute"} & set(counts)
    assert counts["all-gather"] > 20 and counts["all-reduce"] + counts.get("reduce-scatter", 0) > 20


@pytest.mark.slow
def test_activations_stay_where_they_are_on_tpus(cache):
    """Of small layers TPUs' compiler sums whole gradients; of large ones it makes rings of collective-permutes."""
    pytest.importorskip("libtpu")
    counts = run("tpu", cache)
    assert not {"all-to-all", "collective-permute"} & set(counts)
    assert counts["all-gather"] > 20


@pytest.mark.slow
def test_each_axis_of_the_mesh(cache):
    check(run("all", cache))
