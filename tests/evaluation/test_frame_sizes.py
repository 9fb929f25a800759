"""Resizing against PyTorch's, and TensorFlow 1's against its definition, pixel by pixel."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from walt_jax.evaluation.resize import bilinear, cover_and_crop

GOLDEN = load_file(pathlib.Path(__file__).parents[1] / "golden" / "resize.safetensors")


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "frames"])
def test_equals_pytorchs(name):
    sampling, height, width = name.rsplit("_", 2)
    ours = bilinear(GOLDEN["frames"], int(height), int(width), sampling)
    np.testing.assert_allclose(ours, GOLDEN[name], atol=2e-6)


def test_tf1_samples_without_an_offset():
    """Output (y, x) is the input at (y h / H, x w / W), beyond the last pixel the last one."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 2), dtype=np.uint8)
    expected = np.zeros((1, 7, 8, 2))
    for y, x in np.ndindex(7, 8):
        v, u = y * 3 / 7, x * 5 / 8
        for i, a in ((int(v), 1 - v % 1), (min(int(v) + 1, 2), v % 1)):
            for j, b in ((int(u), 1 - u % 1), (min(int(u) + 1, 4), u % 1)):
                expected[0, y, x] += a * b * frames[0, i, j]
    np.testing.assert_allclose(bilinear(frames, 7, 8, "tf1"), expected, atol=1e-4)


def test_the_conventions_differ():
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    tf1, half, corners = (bilinear(frames, 40, 40, name) for name in ("tf1", "half_pixel", "align_corners"))
    assert min(np.abs(tf1 - half).max(), np.abs(tf1 - corners).max(), np.abs(half - corners).max()) > 5


@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (8, 8)])
def test_covering_keeps_the_aspect_ratio_and_the_centre(height, width):
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    frames = np.stack([y, x, y], -1)[None] * np.array([1, 1, 0])[None, None, None]
    out = cover_and_crop(frames, 24, "half_pixel")
    assert out.shape == (1, 24, 24, 3)
    centre = out[0, :, :, :2].mean((0, 1))
    np.testing.assert_allclose(centre, 0, atol=0.05)
