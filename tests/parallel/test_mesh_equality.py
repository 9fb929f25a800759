"""Eight devices compute what one does, however the state and the batch are divided; all programs are in one process."""

import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("eight_devices.py")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def quick(on_eight_devices):
    return on_eight_devices(SCRIPT, "quick")


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


def test_cached_latents_are_those_of_one_device(quick):
    assert quick["encoded"]


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
def test_activations_stay_where_they_are_on_tpus(on_eight_devices):
    """Of small layers TPUs' compiler sums whole gradients; of large ones it makes rings of collective-permutes."""
    pytest.importorskip("libtpu")
    counts = on_eight_devices(SCRIPT, "tpu")
    assert not {"all-to-all", "collective-permute"} & set(counts)
    assert counts["all-gather"] > 20


@pytest.mark.slow
def test_each_axis_of_the_mesh(on_eight_devices):
    check(on_eight_devices(SCRIPT, "all"))
