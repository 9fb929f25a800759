"""Attention in windows equals dense attention under a mask, by each route, and sees nothing else.

The grouped route is for packs, the reshaped one for equal clips, the masked one is the obvious one. `oracles` has a
fourth, in numpy and double precision, that shares no code with them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    BATCHES,
    CLIPS,
    LARGEST,
    PACKS,
    TOKENS,
    WINDOWS,
    dense_attention,
    filled,
    masked,
    normal,
    places_of,
    seen,
)

from walt_jax.denoiser.attend import attend, joined
from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.kernels import MASKED
from walt_jax.denoiser.layout import Layout, PackRows, make_pack, place_clips
from walt_jax.denoiser.packed_attention import from_slots, grouped, rearranged, to_slots
from walt_jax.denoiser.rotary import rotate
from walt_jax.denoiser.windows import Window, window_numbers
from walt_jax.layers import ANY_PLATFORM, compiling_for

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS, HEAD_DIM, WORDS = 2, 8, 4
DIM = HEADS * HEAD_DIM
# Rows of two lengths, and of one; for one data shard, and for one of each pack.
TWO_LENGTHS, OF_EACH_PACK = (((8, 80, 1), (96, 12, CLIPS)), 1), (((8, 28, 2), (96, 3, 2)), PACKS)
CUTS = st.sampled_from([TWO_LENGTHS, OF_EACH_PACK])
MIXED = [[(3, 2, 4), (1, 5, 6), (2, 3, 3)], [(1, 1, 2), (2, 5, 3)], []]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# One module for all windows, so that it is compiled once: in packs a window's name only says where its groups are.
ANY = Window(None, None, None)


def module(relative="bias", window=ANY, qk_norm=True, bounds=LARGEST):
    return WindowAttention(HEADS, (window,), (bounds,), relative, qk_norm, "none", jnp.float32)


def packed(packs, window, isolate_images=False, cut=TWO_LENGTHS):
    rows, shards = cut
    rows = PackRows({window.name: rows}, (16, (TOKENS // 16 + CLIPS) * PACKS // shards))
    pack = make_pack(*place_clips(packs, TOKENS, CLIPS), [window], rows, isolate_images, shards)
    return Layout(pack=pack.replace(groups={ANY.name: pack.groups[window.name]}))


def texts(seed, clips=(PACKS, CLIPS)):
    """Captions of every length, none among them."""
    mask = np.arange(WORDS)[None, None] < np.random.default_rng(seed).integers(0, WORDS + 1, (*clips, 1))
    return normal(seed + 1, *clips, WORDS, DIM), mask


@functools.cache
def parameters(relative, qk_norm=True):
    layout = packed(MIXED, ANY)
    return filled(module(relative, qk_norm=qk_norm), normal(0, PACKS, TOKENS, DIM), layout)["params"]


@functools.cache
def compiled(relative):
    return jax.jit(lambda params, *arguments: module(relative).apply({"params": params}, *arguments))


@jax.jit
def gradients_in_packs(params, x, layout, text, mask, weights):
    def loss(params, x, text):
        return (module("bias").apply({"params": params}, x, layout, text, mask) * weights).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(params, x, text)


@jax.jit
def gradients_of_dense_attention(params, x, text, mask, places, sees, weights):
    def loss(params, x, text):
        return (weights * dense_attention(params, x, places, sees, LARGEST, HEADS, "bias", text, mask, xp=jnp)).sum()

    with jax.numpy_rank_promotion("allow"):
        return jax.grad(loss, argnums=(0, 1, 2))(params, x, text)


@pytest.mark.parametrize(("relative", "with_text"), [("bias", True), ("bias", False), ("rotary", True)])
def test_in_packs_equals_dense_attention_under_a_mask(relative, with_text):
    @settings(max_examples=15, deadline=None)
    @given(BATCHES, WINDOWS, st.booleans(), CUTS, st.integers(0, 99))
    def check(packs, window, isolate_images, cut, seed):
        isolate_images &= not with_text  # W.A.L.T's cross-attention is spatial, without isolated images
        x, (text, mask) = normal(seed, PACKS, TOKENS, DIM), texts(seed) if with_text else (None, None)
        params, places, sees = (
            parameters(relative),
            places_of(packs, TOKENS),
            seen(packs, window, TOKENS, isolate_images),
        )
        ours = compiled(relative)(params, x, packed(packs, window, isolate_images, cut), text, mask)
        twin = dense_attention(params, x, places, sees, LARGEST, HEADS, relative, text, mask)
        inside = places[..., 0] >= 0
        np.testing.assert_allclose(ours[inside], twin[inside], **CLOSE)

    check()


@settings(max_examples=10, deadline=None)
@given(BATCHES, WINDOWS, CUTS, st.integers(0, 99))
def test_in_packs_gradients_equal_those_of_dense_attention(packs, window, cut, seed):
    params, x, (text, mask) = parameters("bias"), normal(seed, PACKS, TOKENS, DIM), texts(seed)
    weights = (places_of(packs, TOKENS)[..., :1] >= 0) * normal(seed + 5, *x.shape)
    ours = gradients_in_packs(params, x, packed(packs, window, cut=cut), text, mask, weights)
    places, sees = places_of(packs, TOKENS), seen(packs, window, TOKENS)
    twin = gradients_of_dense_attention(params, x, text, mask, places, sees, weights)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), ours, twin)


# The last has no normalisation of queries and keys.
EQUAL = [
    ((2, 4, 4), (None, 2, 2), "bias", False, True),
    ((3, 2, 6), (1, None, None), "rotary", True, True),
    ((2, 3, 4), (2, 1, 4), "bias", True, True),
    ((1, 5, 6), (None, None, 3), "none", True, True),
    ((3, 4, 2), (3, 2, None), "rotary", False, False),
]


@pytest.mark.parametrize(("grid", "window", "relative", "with_text", "qk_norm"), EQUAL)
def test_in_equal_clips_equals_dense_attention_under_a_mask(grid, window, relative, with_text, qk_norm):
    window, clips = Window(*window), 2
    tokens = int(np.prod(grid))
    x = normal(0, clips, tokens, DIM)
    text, mask = texts(1, (clips, 1)) if with_text else (None, None)
    params = parameters(relative, qk_norm)

    bounds = window.bounds(LARGEST)
    if relative == "bias":  # of this window's offsets
        params = {**params, "relative_bias": normal(9, *(2 * size - 1 for size in bounds), HEADS)}
    apply = jax.jit(lambda *arguments: module(relative, window, qk_norm, bounds).apply(*arguments))
    ours = apply({"params": params}, x, Layout(grid=grid), text, mask)
    packs = [[grid]] * clips
    places, sees = places_of(packs, tokens), seen(packs, window, tokens)
    twin = dense_attention(params, x, places, sees, bounds, HEADS, relative, text, mask)
    np.testing.assert_allclose(ours, twin, **CLOSE)


def projections(seed=0):
    return tuple(normal(seed + i, PACKS, TOKENS, HEADS, HEAD_DIM) for i in range(3))


def numbers_of(packs, window):
    positions, _ = place_clips(packs, TOKENS, CLIPS)
    return np.stack([window_numbers(pack, window) for pack in positions])


@jax.jit
def masked_route(q, k, v, table, numbers, places):
    offsets = (
        jnp.where((numbers[:, :, None] == numbers[:, None])[..., None], places[:, :, None] - places[:, None], 0)
        + (np.array(LARGEST) - 1)[None, None, None]
    )
    table = table.reshape(*(2 * size - 1 for size in LARGEST), HEADS)
    bias = table[offsets[..., 0], offsets[..., 1], offsets[..., 2]]
    return masked(q, k, v, numbers, jnp.moveaxis(bias, -1, 1))


@jax.jit
def grouped_route(q, k, v, layout, weights):
    """(output, gradients of its product with the weights)."""
    groups = layout.pack.groups[ANY.name]

    def loss(q, k, v, table):
        slots = [to_slots(y.reshape(*y.shape[:2], DIM), groups) for y in (q, k, v)]
        slots = [y.reshape(*y.shape[:2], HEADS, HEAD_DIM) for y in slots]
        coordinates = to_slots(layout.coordinates(), groups)
        y = from_slots(grouped(*slots, groups, coordinates, table, LARGEST), groups, TOKENS)
        return (y * weights).sum(), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, TABLE)
    return y, gradients


TABLE, WEIGHTS = normal(7, 5 * 9 * 11, HEADS), normal(5, PACKS, TOKENS, HEADS, HEAD_DIM)


@settings(max_examples=10, deadline=None)
@given(BATCHES, WINDOWS, CUTS, st.integers(0, 99))
def test_the_grouped_route_equals_the_masked_one(packs, window, cut, seed):
    layout, numbers = packed(packs, window, cut=cut), numbers_of(packs, window)
    inside = numbers >= 0
    q, k, v = projections(seed)
    out, _ = grouped_route(q, k, v, layout, WEIGHTS)
    masked_out, _ = masked_route(q, k, v, TABLE, numbers, layout.coordinates())
    np.testing.assert_allclose(out[inside], masked_out[inside], **CLOSE)
    np.testing.assert_array_equal(out[~inside], 0)


@pytest.mark.parametrize("cut", [TWO_LENGTHS, OF_EACH_PACK])
def test_what_only_fills_a_pack_up_reaches_nothing(cut):
    """Not even as NaN, and neither do its gradients."""
    layout = packed(MIXED, Window(None, 2, 4), cut=cut)
    inside = places_of(MIXED, TOKENS)[..., 0] >= 0
    q, k, v = projections()
    weights = inside[..., None, None] * WEIGHTS
    clean, clean_gradients = grouped_route(q, k, v, layout, weights)
    for value in (np.nan, 1e30):
        dirty = [np.where(inside[..., None, None], x, value) for x in (q, k, v)]
        other, gradients = grouped_route(*dirty, layout, weights)
        np.testing.assert_array_equal(clean, other)
        for one, other in zip(clean_gradients, gradients, strict=True):
            np.testing.assert_array_equal(one, other)


def test_how_rows_are_cut_changes_nothing():
    packs, window = [[(3, 5, 6)]] * PACKS, Window(1, 1, 3)
    q, k, v = projections()
    first, *others = (
        grouped_route(q, k, v, packed(packs, window, cut=cut), WEIGHTS)
        for cut in (
            TWO_LENGTHS,
            (((3, 20, 0), (20, 8, 0), (96, 1, 0)), 1),
            (((3, 90, 1),), 1),
            (((3, 30, 1),), PACKS),
            (((40, 7, 3),), 1),
        )
    )
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), first, other)


def test_logits_are_bounded_whatever_the_weights():
    """q-k normalisation: scaling the projections changes nothing."""
    x, layout, params = normal(0, PACKS, TOKENS, DIM), packed(MIXED, ANY), parameters("bias")
    louder = {**params, "query": {"kernel": 50 * params["query"]["kernel"]}}
    ours = compiled("bias")(params, x, layout, None, None)
    np.testing.assert_allclose(compiled("bias")(louder, x, layout, None, None), ours, atol=1e-4)


def test_images_that_are_alone_have_their_values():
    x, params = normal(0, 2, 12, DIM), parameters("none")
    ours = module("none", Window(None, 2, 2)).apply({"params": params}, x, Layout(grid=(1, 3, 4)), isolate_images=True)
    np.testing.assert_allclose(ours, x @ params["value"]["kernel"] @ params["out"]["kernel"], rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.tuples(*3 * [st.integers(-5, 5)]), st.integers(0, 99))
def test_rotary_scores_depend_on_offsets_alone(shift, seed):
    q, k = normal(seed, 1, 6, HEADS, HEAD_DIM), normal(seed + 1, 1, 6, HEADS, HEAD_DIM)
    places = np.random.default_rng(seed).integers(0, 8, (2, 1, 6, 3))

    def scores(query_places, key_places):
        return np.einsum("bqhd,bkhd->bhqk", rotate(q, query_places), rotate(k, key_places))

    here = scores(*places)
    np.testing.assert_allclose(scores(*(places + np.array(shift))), here, atol=1e-4)
    for axis in range(3):
        assert np.abs(scores(places[0] + np.eye(3, dtype=int)[axis], places[1]) - here).max() > 1e-2


def test_rotary_features_of_time_height_and_width():
    """Of 64 features 16, 24 and 24, as the docstring has it."""
    x = np.ones((1, 1, 1, 64), np.float32)
    for axis, count in enumerate((16, 24, 24)):
        moved = rotate(x, np.eye(3, dtype=int)[axis][None, None]) != x
        assert np.count_nonzero(moved) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_pairs_turn_as_complex_numbers(dtype):
    """By the way that CPUs have, and by that of other platforms."""
    x, places = normal(0, 2, 5, HEADS, 16), np.random.default_rng(1).integers(0, 8, (2, 5, 3))
    frequencies = [10_000.0 ** -(np.arange(count) / count) for count in (2, 3, 3)]
    angles = np.concatenate([places[..., axis, None] * each for axis, each in enumerate(frequencies)], axis=-1)
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)[:, :, None]
    expected, tolerance = np.concatenate([turned.real, turned.imag], axis=-1), 1e-5 if dtype == "float32" else 0.05
    for platform in ("cpu", ANY_PLATFORM):
        with compiling_for(platform):
            found = jax.jit(rotate)(jnp.asarray(x, dtype), places)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99))
def test_the_gradient_of_rearranging_is_that_of_taking(seed):
    rng = np.random.default_rng(seed)
    # 9 of 12 rows go to different ones of 15 places; 15 is no place, and 12 no row.
    back = np.full(12, 15)
    back[rng.permutation(12)[:9]] = rng.permutation(15)[:9]
    there = np.full(16, 12)
    there[back] = np.arange(12)
    there[15] = 12
    there = there[:15]
    x, weights = normal(seed, 12, 3), normal(seed + 1, 15, 3)

    def taken(x):
        return jnp.take(x, there, axis=0, mode="fill", fill_value=0)

    np.testing.assert_array_equal(rearranged(x, there, back), taken(x))
    ours = jax.grad(lambda x: (rearranged(x, there, back) * weights).sum())(x)
    np.testing.assert_array_equal(ours, jax.grad(lambda x: (taken(x) * weights).sum())(x))


@jax.jit
def attention_in_two_parts(q, k, v, weights):
    """(attention over all keys, gradients): of its parts joined, and at once."""

    def parts(q, k, v):
        return joined(attend(q, k[:, :3], v[:, :3]), attend(q, k[:, 3:], v[:, 3:]))

    def whole(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD_DIM))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return [
        (function(q, k, v), jax.grad(lambda *a, f=function: (f(*a) * weights).sum(), argnums=(0, 1, 2))(q, k, v))
        for function in (parts, whole)
    ]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(0, 100))
def test_joined_attention_is_that_over_the_keys_of_both_and_so_are_its_gradients(seed, scale):
    q = scale * normal(seed, 2, 5, HEADS, HEAD_DIM)  # of large scale, where a softmax without care overflows
    k, v = (normal(seed + i, 2, 7, HEADS, HEAD_DIM) for i in (1, 2))
    (ours, gradients), (whole, others) = attention_in_two_parts(q, k, v, normal(seed + 3, *q.shape))
    np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-4)
    for one, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * max(1, scale))


def plainly(q, k, v, bias, mask):
    """Attention and its sums as one would write them, for the gradient to be found by differentiation."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD_DIM)
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else jnp.where(mask, logits, MASKED)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v), jax.nn.logsumexp(logits, -1).swapaxes(1, 2)


@functools.cache
def slopes(function):
    """Gradients of everything that can have one, weighted so that no two numbers count alike."""

    def weighed(arguments, mask, weights):
        out, logsum = function(*arguments, mask)
        seen = logsum > MASKED / 2  # of a row that sees nothing it is a huge number, which tells nothing
        return (out * weights[0]).sum() + jnp.where(seen, logsum * weights[1], 0).sum()

    return jax.jit(jax.grad(weighed))


@pytest.mark.parametrize("biases", [None, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_gradient_is_that_of_its_equations(seed, biases, masked):
    q, k, v = (normal(seed + i, 3, n, HEADS, HEAD_DIM) for i, n in enumerate((5, 7, 7)))
    bias = None if biases is None else normal(seed + 3, biases, HEADS, 5, 7)
    mask = None
    if masked:
        mask = np.random.default_rng(seed).random((3, 1, 5, 7)) < 0.5
        mask[0, 0, 2] = False  # sees nothing
    weights = normal(seed + 4, 3, 5, HEADS, HEAD_DIM), normal(seed + 5, 3, 5, HEADS)
    ours, theirs = (slopes(each)((q, k, v, bias), mask, weights) for each in (attend, plainly))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_with_numbers_of_16_bits_sums_keep_32():
    """Shares of text and tokens come from a difference of these sums, where 8 bits are too few."""
    q, k, v = (jnp.asarray(y[:1, :7], jnp.bfloat16) for y in projections())
    out, logsum = attend(q, k, v)
    assert (out.dtype, logsum.dtype) == (jnp.bfloat16, jnp.float32)


def test_with_numbers_of_16_bits_packs_and_equal_clips_give_the_same():
    grid, tokens = (2, 3, 4), 24
    rows = PackRows({ANY.name: ((tokens, 2, 1),)}, (tokens, 2))
    pack = Layout(pack=make_pack(*place_clips([[grid], [grid]], tokens, 1), [ANY], rows))
    x, text, mask = normal(0, 2, tokens, DIM), *texts(1, (2, 1))
    layer = WindowAttention(HEADS, (ANY,), (LARGEST,), "bias", True, "none", jnp.bfloat16)
    apply = jax.jit(layer.apply)
    one, other = (apply({"params": parameters("bias")}, x, layout, text, mask) for layout in (Layout(grid=grid), pack))
    assert one.dtype == other.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.05, atol=0.05)
