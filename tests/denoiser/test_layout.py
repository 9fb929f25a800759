"""Every token's place is what counting finds, and values of clips reach the clips' tokens."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BATCHES, CLIPS, PACKS, TOKENS, WINDOWS, normal, places_of, seen

from walt_jax.denoiser.layout import (
    Layout,
    Needs,
    PackRows,
    from_tokens,
    make_pack,
    place_clips,
    raster,
    to_tokens,
)
from walt_jax.denoiser.windows import Window


def layout_of(packs, tokens=TOKENS, clips=CLIPS):
    return Layout(pack=make_pack(*place_clips(packs, tokens, clips), [], PackRows({}, (tokens, clips * len(packs)))))


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


@settings(max_examples=15, deadline=None)
@given(BATCHES, WINDOWS, st.booleans(), st.integers(1, 4), st.sampled_from([1, PACKS]), st.booleans())
def test_rows_suit_the_packs_that_they_are_chosen_for(packs, window, isolate_images, most, shards, text):
    positions, sizes = places = place_clips(packs, TOKENS, CLIPS)
    parts = zip(np.split(positions, shards), np.split(sizes, shards), strict=True)
    needs = [Needs.of(*part, [window], isolate_images) for part in parts]
    rows = PackRows.choose(needs, most, [window] * text, text_alone=text)
    assert all(map(rows.hold, needs)) and len(rows.windows[window.name]) <= most
    clips = [[Needs.of(*place_clips([[grid]], TOKENS, 1), [window], isolate_images) for grid in p] for p in packs]
    for number, shard in enumerate(needs):
        of_clips = [clip for pack in np.arange(PACKS).reshape(shards, -1)[number] for clip in clips[pack]]
        if of_clips:
            added = Needs.sum(of_clips)
            alike = (sorted(each.windows[window.name].tolist()) for each in (added, shard))
            assert next(alike) == next(alike)
            np.testing.assert_array_equal(added.clips, shard.clips)
    pack = make_pack(*places, [window], rows, isolate_images, shards)
    assert (pack.text is not None) == text
    sees, groups = seen(packs, window, TOKENS, isolate_images), pack.groups[window.name]
    for row, token in np.ndindex(PACKS, TOKENS):
        shard, first = row // (PACKS // shards), row % (PACKS // shards) * TOKENS
        others = first + np.flatnonzero(sees[row, token])
        slot = groups.place[shard, first + token]
        if slot < groups.slots.shape[1]:
            mine = groups.slot_window[shard] == groups.slot_window[shard, slot]
            assert set(groups.slots[shard][mine]) == set(others)
        else:
            assert positions[row, token, 0] < 0


def test_rows_without_room_hold_no_more():
    needs = Needs.of(*place_clips([[(2, 2, 2), (1, 2, 2)]], 12, 2), [Window(1, None, None)], False)
    name = "1×all×all"
    assert needs.windows[name].tolist() == [[4, 0], [4, 0], [4, 1]] and needs.clips.tolist() == [8, 4]
    for windows, text, holds in (
        (3, (4, 3), True),
        (2, (4, 3), False),
        (3, (4, 2), False),
        (3, (8, 2), True),
        (3, None, True),
        (2, None, False),
    ):
        assert PackRows({name: ((4, windows, 1),)}, text).hold(needs) == holds


def test_isolated_tokens_are_windows_of_their_own():
    places, window = place_clips([[(1, 2, 2)]], 6, 1), Window(None, 2, 2)
    rows = PackRows.choose([Needs.of(*places, [window], True)])
    (groups,) = make_pack(*places, [window], rows, isolate_images=True).groups.values()
    assert sorted(groups.slot_window[groups.slot_window >= 0]) == [0, 1, 2, 3]
