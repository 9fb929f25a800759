"""FID's Inception with random weights against pytorch-fid's."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from walt_jax.errors import UserError
from walt_jax.evaluation import inception

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script(golden_script):
    return golden_script("make_inception")


def shapes():
    """Of the state dict, by PyTorch's names."""
    found = {}
    for name, (height, width, into, out) in inception.kernels().items():
        if name == "fc":
            found |= {"fc.weight": (out, into), "fc.bias": (out,)}
        else:
            found[f"{name}.conv.weight"] = (out, into, height, width)
            found |= {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return found


@pytest.fixture(scope="module")
def state(script):
    return script.random_state(shapes())


def test_equals_pytorch_fid(state, script):
    expected = load_file(GOLDEN / "inception.safetensors")
    weights = inception.weights_from(state, "random")
    images = script.images() / np.float32(127.5) - 1
    features, logits = jax.jit(inception.features_and_logits)(weights, images)
    scale = expected["features"].std()
    np.testing.assert_allclose(features / scale, expected["features"] / scale, atol=1e-4)
    np.testing.assert_allclose(
        logits / expected["logits"].std(), expected["logits"] / expected["logits"].std(), atol=1e-4
    )


def test_other_weights_are_named(state):
    with pytest.raises(UserError, match=r"lack 'Conv2d_1a_3x3\.conv\.weight'"):
        inception.weights_from({}, "w.pth")
    with pytest.raises(UserError, match=r"hold fc of shape \[1, 1, 2048, 1000\]"):
        torchvisions = {**state, "fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)}
        inception.weights_from(torchvisions, "w.pth")
