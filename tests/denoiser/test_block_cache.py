"""FirstBlockCache: with a threshold that nothing passes it changes nothing; else the first block alone is computed."""

import dataclasses

import jax
import numpy as np
import pytest

from walt_jax.denoiser.latte_block import LatteConfig
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import BlockCache, Condition, Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.generation.latent_diffusion import unboxed

pytestmark = pytest.mark.usefixtures("quick_compilation")
GRID, ROWS, CHANNELS, DIM = (3, 2, 2), 2, 2, 16
WALT = WaltConfig(
    dim=DIM, heads=2, layers=4, windows=((1, None, None), (None, 1, 1)), positions="fractional", relative="rotary",
    cross_attention=False, self_conditioning=False,
)  # fmt: skip
LATTE = LatteConfig(
    dim=DIM, heads=2, layers=4, windows=((1, None, None), (None, 1, 1)), classes=0, cross_attention=False,
)  # fmt: skip
NOISY = np.random.default_rng(0).normal(size=(3, ROWS, 12, CHANNELS)).astype(np.float32)
TIMES = np.array([[[1.0]] * ROWS, [[0.7]] * ROWS, [[0.3]] * ROWS], np.float32)


def model_of(config):
    """(denoiser, parameters, all random)"""
    denoiser = Denoiser(config, GRID)
    shapes = unboxed(jax.eval_shape(denoiser.init, jax.random.key(0), *arguments(0)))["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    rng = np.random.default_rng(1)
    return denoiser, tree.unflatten([0.3 * rng.normal(size=leaf.shape).astype(np.float32) for _, leaf in leaves])


def arguments(number, rows=slice(None)):
    return NOISY[number][rows], TIMES[number][rows], Condition(), Layout(grid=GRID)


def empty(threshold, rows=ROWS):
    zeros = np.zeros((rows, 12, DIM), np.float32)
    return BlockCache(zeros, zeros, threshold)


def cached(denoiser, params, number, cache, rows=slice(None)):
    run = jax.jit(lambda params, cache: denoiser.apply({"params": params}, *arguments(number, rows), cache=cache))
    return jax.device_get(run(params, cache))


@pytest.mark.parametrize("config", [WALT, dataclasses.replace(WALT, scan=True), LATTE], ids=["walt", "scan", "latte"])
def test_a_threshold_that_nothing_passes_changes_nothing(config):
    denoiser, params = model_of(config)
    cache = empty(1e-9)
    for number in range(3):
        expected = jax.jit(denoiser.apply)({"params": params}, *arguments(number))
        found, cache = cached(denoiser, params, number, cache)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(cache.first).min() > 0 and np.abs(cache.rest).min() > 0


def test_a_row_that_changes_little_has_its_first_block_alone():
    """With what the others added: of zeros, it is a denoiser of one block."""
    denoiser, params = model_of(WALT)
    one = dataclasses.replace(WALT, layers=1, windows=WALT.windows[:1])
    own = {name: params[name] for name in params if not name.startswith("cycle")}
    own["cycle0"] = {"block0": params["cycle0"]["block0"]}
    expected = jax.jit(Denoiser(one, GRID).apply)({"params": own}, *arguments(1))
    _, cache = cached(denoiser, params, 0, empty(1e9))
    found, after = cached(denoiser, params, 1, cache.replace(rest=np.zeros_like(cache.rest)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(after.first, cache.first)  # of the last evaluation of all blocks
    full = jax.jit(denoiser.apply)({"params": params}, *arguments(1))
    reused, _ = cached(denoiser, params, 1, cache)
    assert np.abs(reused - expected).max() > 1e-3 and np.abs(reused - full).max() > 1e-3


def test_the_first_evaluation_has_all_blocks():
    denoiser, params = model_of(WALT)
    expected = jax.jit(denoiser.apply)({"params": params}, *arguments(0))
    np.testing.assert_allclose(cached(denoiser, params, 0, empty(1e9))[0], expected, atol=1e-4)


def test_each_row_is_as_it_would_be_alone():
    """Of two rows the second's first block is as before and the first's is not."""
    denoiser, params = model_of(WALT)
    _, cache = cached(denoiser, params, 1, empty(0.2))
    stale = cache.replace(first=cache.first * np.array([2.0, 1.01], np.float32)[:, None, None])
    stale = stale.replace(rest=stale.rest + np.linspace(-1, 1, stale.rest.shape[-1], dtype=np.float32))
    together, after = cached(denoiser, params, 1, stale)
    for row in range(ROWS):
        rows = slice(row, row + 1)
        alone, own = cached(denoiser, params, 1, jax.tree.map(lambda leaf, rows=rows: leaf[rows], stale), rows)
        np.testing.assert_allclose(together[rows], alone, atol=1e-4)
        np.testing.assert_allclose(after.rest[rows], own.rest, atol=1e-4)
    full = jax.jit(denoiser.apply)({"params": params}, *arguments(1))
    np.testing.assert_allclose(together[0], full[0], atol=1e-4)
    assert np.abs(together[1] - full[1]).max() > 1e-2
