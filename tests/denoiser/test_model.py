"""The denoiser equals a plain loop over its blocks' equations, and sees what it should and nothing else."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.model import Denoiser, DenoiserConfig, timestep_embedding
from walt_jax.denoiser.windows import Window

CONFIG = DenoiserConfig(dim=8, heads=2, layers=2, windows=((1, None, None), (None, 1, 2)), patch_size=(1, 1, 2))
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(grid=(2, 2, 4), clips=2):
    """noisy, time, text, text_mask, estimate."""
    time = np.array([0.3, 0.9], np.float32)
    return normal(0, clips, *grid, 3), time, normal(1, clips, 4, 5), MASK, normal(2, clips, *grid, 3)


def filled(module, *arguments):
    """All parameters random: what is zero at initialisation would hide mistakes."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *arguments))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def variables():
    return filled(Denoiser(CONFIG), *inputs())


@pytest.fixture(scope="module")
def denoise(variables):
    return jax.jit(functools.partial(Denoiser(CONFIG).apply, variables))


def swish(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled_attention(heads, window, params, x, *text):
    return WindowAttention(heads, Window(*window), jnp.float32).apply({"params": params}, x, *text)


def attention(*arguments):
    """Proved in test_windows.py."""
    return np.asarray(compiled_attention(*arguments))


def cycles(params, config):
    """The parameters of each cycle of windows; those of a scan are stacked."""
    count = config.layers // len(config.windows)
    if config.scan:
        return [jax.tree.map(lambda leaf, cycle=cycle: leaf[cycle], params["cycles"]) for cycle in range(count)]
    return [params[f"cycle{cycle}"] for cycle in range(count)]


def twin(params, config, noisy, time, text, text_mask, estimate):
    """W.A.L.T's equations in numpy, a clip and a block at a time; windows are the one thing that it takes from ours."""
    outputs = []
    for z, t, words, mask, guess in zip(noisy, time, text, text_mask, estimate, strict=True):
        both = np.concatenate([z, guess], -1) if config.self_conditioning else z
        (pt, ph, pw), channels = config.patch_size, z.shape[-1]
        grid = tuple(length // patch for length, patch in zip(z.shape, config.patch_size, strict=False))
        x = np.empty((*grid, config.dim))
        for i, j, k in np.ndindex(*grid):
            patch = both[i * pt : (i + 1) * pt, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw]
            x[i, j, k] = linear(params["patch_in"], patch.ravel())
            x[i, j, k] += params["space_embedding"][0, j, k] + params["time_embedding"][i, 0, 0]
        words = linear(params["text_in"], words)
        frequencies = [10_000 ** (-i / 128) for i in range(128)]
        waves = [wave(1000 * float(t) * f) for wave in (math.cos, math.sin) for f in frequencies]
        clock = linear(params["time_out"], swish(linear(params["time_in"], np.array(waves))))
        caption = linear(params["text_pooled"], words[mask].mean(0))
        condition = swish(clock + caption)
        first = linear(params["adaln"], condition)
        text_of = words[None].astype(np.float32), mask[None]
        for layer in range(config.layers):
            cycle, index = divmod(layer, len(config.windows))
            block = cycles(params, config)[cycle][f"block{index}"]
            # A_i = A_1 + W_b W_a (c + t)
            modulation = first + linear(block["adaln_b"], linear(block["adaln_a"], condition))
            scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = np.split(modulation, 6)
            h = (plain_norm(x) * (1 + scale_1) + shift_1)[None].astype(np.float32)
            x = x + gate_1 * attention(config.heads, config.windows[index], block["self_attention"], h)[0]
            h = plain_norm(x)[None].astype(np.float32)
            x = x + attention(config.heads, (1, None, None), block["cross_attention"], h, *text_of)[0]
            h = plain_norm(x) * (1 + scale_2) + shift_2
            x = x + gate_2 * linear(block["mlp_out"], gelu(linear(block["mlp_in"], h)))
        scale, shift = np.split(linear(params["adaln_out"], condition), 2)
        patches = linear(params["patch_out"], plain_norm(x) * (1 + scale) + shift)
        out = np.empty_like(z)
        for i, j, k in np.ndindex(*grid):
            patch = patches[i, j, k].reshape(pt, ph, pw, channels)
            out[i * pt : (i + 1) * pt, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw] = patch
        outputs.append(out)
    return np.stack(outputs)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"scan": True, "layers": 4},
        {"patch_size": (2, 1, 1), "windows": ((None, None, None),), "mlp_ratio": 2, "adaln_rank": 3},
        {"self_conditioning": False, "patch_size": (1, 2, 2), "layers": 4},
    ],
)
def test_equals_the_papers_equations(changed):
    config = dataclasses.replace(CONFIG, **changed)
    arguments = inputs((2, 4, 4))
    variables = filled(Denoiser(config), *arguments)
    ours = jax.jit(Denoiser(config).apply)(variables, *arguments)
    assert ours.shape == arguments[0].shape
    np.testing.assert_allclose(ours, twin(variables["params"], config, *arguments), rtol=1e-4, atol=1e-4)


def test_scanned_and_unrolled_blocks_give_the_same():
    config = dataclasses.replace(CONFIG, layers=4)
    params = filled(Denoiser(config), *inputs())["params"]
    stacked = {name: leaf for name, leaf in params.items() if not name.startswith("cycle")}
    stacked["cycles"] = jax.tree.map(lambda *leaves: np.stack(leaves), *cycles(params, config))
    looped = jax.jit(Denoiser(config).apply)({"params": params}, *inputs())
    scanned = jax.jit(Denoiser(dataclasses.replace(config, scan=True)).apply)({"params": stacked}, *inputs())
    np.testing.assert_allclose(scanned, looped, rtol=1e-5, atol=1e-5)


def test_at_initialisation_the_output_is_zero():
    model = Denoiser(dataclasses.replace(CONFIG, layers=1, windows=((None, None, None),)))
    output, _ = jax.jit(model.init_with_output)(jax.random.key(0), *inputs())
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, np.zeros_like(inputs()[0]))


def test_padding_of_the_text_has_no_effect(denoise):
    noisy, time, text, mask, estimate = inputs()
    other = np.where(mask[..., None], text, 1e3 * normal(7, *text.shape))
    np.testing.assert_array_equal(denoise(noisy, time, other, mask, estimate), denoise(*inputs()))
    longer = np.pad(text, ((0, 0), (0, 3), (0, 0)), constant_values=5), np.pad(mask, ((0, 0), (0, 3)))
    np.testing.assert_allclose(denoise(noisy, time, *longer, estimate), denoise(*inputs()), rtol=1e-4, atol=1e-5)


def test_a_clip_depends_on_all_of_its_own_inputs_and_on_no_other_clips(denoise):
    noisy, time, text, mask, estimate = inputs()

    def of_first_clip(noisy, time, text, estimate):
        return (denoise(noisy, time, text, mask, estimate)[0] * normal(5, *noisy.shape[1:])).sum()

    for gradient in jax.grad(of_first_clip, argnums=(0, 1, 2, 3))(noisy, time, text, estimate):
        assert np.any(gradient[0] != 0)
        np.testing.assert_array_equal(gradient[1], np.zeros_like(gradient[1]))


def test_the_estimate_is_used_and_is_zeros_where_there_is_none(denoise):
    *others, estimate = inputs()
    assert np.abs(denoise(*others, estimate) - denoise(*others, 2 * estimate)).max() > 1e-3
    np.testing.assert_allclose(denoise(*others), denoise(*others, 0 * estimate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 4)])
def test_patches_divide_the_tokens_and_not_the_output(patch_size):
    config = dataclasses.replace(CONFIG, patch_size=patch_size, windows=((None, None, None),), dtype="bfloat16")
    arguments = inputs()
    output, boxed = jax.eval_shape(Denoiser(config).init_with_output, jax.random.key(0), *arguments)
    assert output.shape == arguments[0].shape
    assert output.dtype == jnp.float32  # whatever the computation's
    params = nn.meta.unbox(boxed)["params"]
    assert params["time_embedding"].shape == (2 // patch_size[0], 1, 1, 8)
    assert params["space_embedding"].shape == (1, 2 // patch_size[1], 4 // patch_size[2], 8)


def counts(config, grid=(5, 16, 16), text=2048):
    """(parameters of the modulation, without biases; of all), for latents of 8 channels and T5-XL's embeddings."""
    arguments = np.zeros((1, *grid, 8)), np.zeros(1), np.zeros((1, 3, text)), np.ones((1, 3), bool)
    params = nn.meta.unbox(jax.eval_shape(Denoiser(config).init, jax.random.key(0), *arguments))["params"]
    leaves = [(jax.tree_util.keystr(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    modulation = sum(size for name, size in leaves if re.search(r"'adaln(_a|_b)?'\]\['kernel'", name))
    return modulation, sum(size for _, size in leaves)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_adaln_lora_has_as_many_parameters_as_the_paper_says(dim, rank, count, scan):
    dim, layers = 4 * dim, 2 * count
    config = DenoiserConfig(dim, 2, layers, ((1, None, None), (None, 8, 8)), adaln_rank=rank, scan=scan)
    modulation, _ = counts(config)
    assert modulation == 6 * dim**2 + layers * (dim * rank + rank * 6 * dim)


def test_the_papers_sizes():
    """Table 8 and the ablations: ViT-g's modulation is 12M, with 475M if separate; W.A.L.T-L with text has 419M."""
    windows = ((1, None, None), (None, 8, 8))
    modulation, _ = counts(DenoiserConfig(1408, 16, 40, windows, scan=True))
    assert round(modulation / 1e6, 1) == 12.7
    _, everything = counts(DenoiserConfig(1024, 16, 24, windows, scan=True))
    assert abs(everything / 419e6 - 1) < 0.02


@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_has_a_name_for_each_axis(scan):
    model = Denoiser(dataclasses.replace(CONFIG, scan=scan))
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs())
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim for leaf in leaves)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"layers": 3}, "layers=3 is not a multiple of the 2 windows"), ({"heads": 3}, "heads=3 does not divide dim=8")],
)
def test_configs_that_can_not_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=3), st.integers(1, 5))
def test_timestep_embedding(times, half):
    embedded = timestep_embedding(jnp.array(times, jnp.float32), 2 * half)
    for row, time in zip(embedded, times, strict=True):
        twin = [wave(1000 * time * 10_000 ** (-i / half)) for wave in (math.cos, math.sin) for i in range(half)]
        np.testing.assert_allclose(row, twin, atol=1e-3)
