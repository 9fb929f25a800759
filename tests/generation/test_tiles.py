"""Tiles: they cover all of a clip, a mean over them is what each has, and their edges can't be seen."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.layout import from_tokens, to_tokens
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig
from walt_jax.generation.tiles import OVERLAP, Tiles

pytestmark = pytest.mark.usefixtures("quick_compilation")
axes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))


@settings(deadline=None, max_examples=50)
@given(axes, axes, st.sampled_from([1, 2]))
def test_tiles_cover_a_clip_and_their_mean_is_the_clip(grid, size, unit):
    size = tuple(min(one, whole) for one, whole in zip(size, grid, strict=True))
    if unit == 2:
        grid, size = ((t, 2 * h, 2 * w) for t, h, w in (grid, size))
    tiles = Tiles(grid, size, unit)
    tokens = np.random.default_rng(0).normal(size=(2, int(np.prod(grid)), 3)).astype(np.float32)
    cut = tiles.cut(jnp.asarray(tokens))
    np.testing.assert_allclose(tiles.blend(cut), tokens, atol=1e-5)
    whole = tokens.reshape(2, *grid, 3)
    for (t, y, x), tile in zip(tiles.starts, cut, strict=True):
        a, b, c = size
        np.testing.assert_array_equal(tile.reshape(2, *size, 3), whole[:, t : t + a, y : y + b, x : x + c])
        assert y % unit == x % unit == 0
    for axis in (1, 2):
        places = sorted({start[axis] for start in tiles.starts})
        if unit == 1 and size[axis] > 1:
            assert all(b - a <= size[axis] * (1 - OVERLAP) + 1 for a, b in itertools.pairwise(places))


def test_low_resolution_is_cut_where_tokens_are():
    """Of patches of 2 × 2 and twice the size, each token has one low-resolution position."""
    tiles = Tiles((2, 6, 8), (2, 4, 4), 2)
    low = np.arange(2 * 6 * 8, dtype=np.float32).reshape(1, 2, 6, 8, 1)
    cut = tiles.cut_latents(jnp.asarray(low), 1, 1)
    tokens = tiles.cut(to_tokens(jnp.asarray(low), (1, 1, 1)))
    np.testing.assert_array_equal(cut.reshape(tokens.shape), tokens)


CONFIG = WaltConfig(
    dim=16, heads=2, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary", upscale=2,
    cross_attention=False, classes=4, self_conditioning=False,
)  # fmt: skip


class Local(LatentDiffusion):
    """Each value depends on its own place alone: noisy, low-resolution and label."""

    def denoise(self, params, condition, layout):
        low = to_tokens(jnp.repeat(jnp.repeat(condition.low_res, 2, 2), 2, 3), (1, 1, 1))

        def answer(noisy, time, estimate):
            return jnp.tanh(noisy + low + 0.3 * condition.label[..., None].astype(jnp.float32))

        return answer


class Slanted(Local):
    """Besides, each tile has a slope of its own, which would be a step where tiles meet."""

    def denoise(self, params, condition, layout):
        place = layout.coordinates()[..., 2:] / layout.grid[2]
        return lambda noisy, time, estimate: jnp.broadcast_to(place, noisy.shape)


def sample(kind, tile, shape=(2, 4, 24, 2)):
    model = kind(None, None, Denoiser(CONFIG, (2, 4, 8)), DiffusionConfig(Schedule("cosine"), "x0"), (2, 4, 8, 2))
    low = np.random.default_rng(0).normal(size=(1, 2, 2, shape[2] // 2, 2)).astype(np.float32)
    settings = SamplingConfig(3, "dpm++2m", GuidanceConfig(scale=2.0))
    label, empty, seeds = jnp.array([[1]]), jnp.array([[4]]), np.zeros(1, np.uint32)
    return np.asarray(model.sample({}, label, empty, seeds, settings, shape, low_res=low, tile=tile))


def test_tile_by_tile_is_the_whole_where_nothing_reaches_further():
    np.testing.assert_allclose(sample(Local, (2, 4, 8)), sample(Local, None), atol=1e-4)


def test_no_edge_of_a_tile_can_be_seen():
    """A slope from 0 to 1 in each tile of 8 tokens would jump by 7/8 from one tile to the next without overlap."""
    values = sample(Slanted, (2, 4, 8))[0, 0, 0, :, 0]
    steps = np.abs(np.diff(values))
    edges = sorted(
        {start[2] + offset for start in Tiles((2, 4, 24), (2, 4, 8), 2).starts for offset in (-1, 7)} - {-1, 23}
    )
    assert steps[edges].max() <= steps.max() + 1e-6
    assert steps.max() < 0.5 < 7 / 8
    assert steps[edges].mean() <= 1.5 * steps.mean()


def test_grids_and_patches():
    latents = np.random.default_rng(0).normal(size=(1, 2, 8, 8, 3)).astype(np.float32)
    tiles = Tiles((2, 4, 4), (2, 2, 4))
    cut = tiles.cut(to_tokens(jnp.asarray(latents), (1, 2, 2)))
    np.testing.assert_array_equal(from_tokens(cut[0], (2, 2, 4), (1, 2, 2)), latents[:, :, :4])
