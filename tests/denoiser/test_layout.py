"""Every token's place is what counting finds, and values of clips reach the clips' tokens."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BATCHES, CLIPS, TOKENS, WINDOWS, normal, places_of, seen

from walt_jax.denoiser.layout import Layout, from_tokens, make_pack, place_clips, raster, row_lengths, to_tokens
from walt_jax.denoiser.windows import Window


def layout_of(packs, tokens=TOKENS, clips=CLIPS):
    return Layout(pack=make_pack(*place_clips(packs, tokens, clips), [], {}))


@settings(max_examples=30, deadline=None)
@given(BATCHES)
def test_places_are_those_of_counting(packs):
    positions, sizes = place_clips(packs, TOKENS, CLIPS)
    twin = places_of(packs, TOKENS)
    inside = twin[..., 0] >= 0
    np.testing.assert_array_equal(positions[inside], twin[inside])
    assert np.all(positions[~inside] == [-1, 0, 0, 0])
    for pack, grids in enumerate(packs):
        np.testing.assert_array_equal(sizes[pack], grids + [(0, 0, 0)] * (CLIPS - len(grids)))


@pytest.mark.parametrize(
    ("grids", "sentence"),
    [
        ([(2, 4, 4), (1, 3, 3)], "a pack of 2 clips with 41 tokens overflows 3 clips, 40 tokens"),
        ([(1, 1, 1)] * 4, "a pack of 4 clips with 4 tokens overflows 3 clips, 40 tokens"),
    ],
)
def test_a_pack_that_overflows_is_refused(grids, sentence):
    with pytest.raises(ValueError, match=sentence):
        place_clips([[], grids], 40, 3)


def test_a_pack_may_be_full():
    positions, _ = place_clips([[(2, 4, 4), (1, 2, 4)]], 40, 2)
    assert np.all(positions[..., 0] >= 0)


@settings(max_examples=10, deadline=None)
@given(BATCHES, st.integers(0, 99))
def test_spreading_gives_each_token_its_clips_value(packs, seed):
    layout, values = layout_of(packs), normal(seed, len(packs), CLIPS, 5)
    twin = np.zeros((len(packs), TOKENS, 5), np.float32)
    for pack, token in np.ndindex(len(packs), TOKENS):
        segment = layout.pack.positions[pack, token, 0]
        if segment >= 0:
            twin[pack, token] = values[pack, segment]
    np.testing.assert_array_equal(layout.spread(values), twin)
    np.testing.assert_array_equal(layout.valid(), layout.pack.positions[..., 0] >= 0)
    np.testing.assert_array_equal(layout.coordinates(), layout.pack.positions[..., 1:])
    np.testing.assert_array_equal(layout.clip_sizes(), layout.pack.sizes)


def test_the_gradient_of_spreading_sums_over_each_clips_tokens():
    layout = layout_of([[(1, 2, 3), (2, 2, 2)], []], 20, 2)
    weights = normal(0, 2, 20, 5)
    gradient = jax.grad(lambda values: (layout.spread(values) * weights).sum())(normal(1, 2, 2, 5))
    np.testing.assert_allclose(gradient[0], [weights[0, :6].sum(0), weights[0, 6:14].sum(0)], rtol=1e-5)
    np.testing.assert_array_equal(gradient[1], np.zeros((2, 5)))


def test_equal_clips_share_their_places_and_have_one_value_each():
    layout, values = Layout(grid=(2, 3, 4)), normal(0, 5, 1, 6)
    np.testing.assert_array_equal(layout.spread(values), values)
    np.testing.assert_array_equal(layout.coordinates(), [list(np.ndindex(2, 3, 4))])
    np.testing.assert_array_equal(raster((2, 3, 4)), list(np.ndindex(2, 3, 4)))
    np.testing.assert_array_equal(layout.clip_sizes(), [[[2, 3, 4]]])
    assert np.all(layout.valid())


@settings(max_examples=10, deadline=None)
@given(st.tuples(*3 * [st.integers(1, 3)]), st.tuples(*3 * [st.integers(1, 2)]))
def test_patches_become_tokens_in_raster_order_and_latents_again(grid, patch):
    latents = normal(0, 2, *(length * size for length, size in zip(grid, patch, strict=True)), 3)
    tokens = to_tokens(latents, patch)
    assert tokens.shape == (2, math.prod(grid), 3 * math.prod(patch))
    for token, (t, y, x) in enumerate(np.ndindex(*grid)):
        pt, ph, pw = patch
        part = latents[:, t * pt : (t + 1) * pt, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw]
        np.testing.assert_array_equal(tokens[:, token], part.reshape(2, -1))
    np.testing.assert_array_equal(from_tokens(tokens, grid, patch), latents)


@settings(max_examples=30, deadline=None)
@given(BATCHES, WINDOWS, st.booleans(), st.integers(1, 4))
def test_row_lengths_suit_the_packs_that_they_are_made_for(packs, window, isolate_images, most):
    places = place_clips(packs, TOKENS, CLIPS)
    lengths = row_lengths(*places, [window], isolate_images, most)
    assert len(lengths[window.name]) <= most
    pack = make_pack(*places, [window], lengths, isolate_images)  # refuses windows longer than the longest row
    # A token is in the group of those that it sees; one that sees only itself may be in none.
    sees = seen(packs, window, TOKENS, isolate_images)
    groups = pack.groups[window.name]
    for row, token in np.ndindex(len(packs), TOKENS):
        slot = groups.place[row * TOKENS + token]
        others = row * TOKENS + np.flatnonzero(sees[row, token])
        if slot < groups.slots.size:
            chunk, place = divmod(slot, groups.slots.shape[1])
            length = lengths[window.name][groups.kind[chunk] - 1]
            start = place // length * length
            mine = groups.row_window[chunk, start : start + length] == groups.row_window[chunk, place]
            assert set(groups.slots[chunk, start : start + length][mine]) == set(others)
        else:
            assert list(others) == [row * TOKENS + token]


def test_where_no_token_is_in_a_window_there_is_a_length_nevertheless():
    places = place_clips([[(1, 2, 2)]], 6, 1)
    lengths = row_lengths(*places, [Window(None, 2, 2)], isolate_images=True)
    assert lengths == {"all×2×2": (1,)}
    assert not np.any(make_pack(*places, [Window(None, 2, 2)], lengths, isolate_images=True).groups["all×2×2"].kind)
