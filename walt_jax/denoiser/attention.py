"""Multi-head attention within windows: a reshaped and a grouped route with equal results."""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from walt_jax.denoiser.context import (
    check_heads,
    exchangeable,
    from_windows,
    on_each_device,
    parts,
    to_windows,
    whole,
)
from walt_jax.denoiser.grouping import Groups, TextRows
from walt_jax.denoiser.head_norm import HeadNorm
from walt_jax.denoiser.kernels import MASKED
from walt_jax.denoiser.kernels.sharded import holds, sharded, sharded_windows
from walt_jax.denoiser.layout import Grid, Layout, raster
from walt_jax.denoiser.windows import Window, in_windows, merge, partition
from walt_jax.layers import Initializer, Linear, on_cpu
from walt_jax.parallel.analysis import MOVES
from walt_jax.parallel.rules import constrain

Relative = Literal["bias", "rotary", "none"]


def relative_index(
    query: Int[Array, "*n q 3"], key: Int[Array, "*n k 3"], bounds: tuple[int, int, int]
) -> Int[Array, "*n q k"]:
    """For each pair of a window's tokens, the index of their offset (t, y, x) among all offsets (Liu et al. 2021)."""
    offset = query[..., :, None, :] - key[..., None, :, :]
    index = 0
    for axis, size in enumerate(bounds):
        index = index * (2 * size - 1) + offset[..., axis] + size - 1
    return index


def rotate(x: Float[Array, "b n heads d"], coordinates: Int[Array, "b n 3"]) -> Float[Array, "b n heads d"]:
    """3-D rotary embedding: pairs of features turn by t, y or x times their frequency (Su et al. 2021).

    A quarter of the pairs is for time, the rest for height and width by halves, of 64 features 16, 24 and 24. A pair is
    a feature of the first half of them and one of the second.
    """
    pairs = x.shape[-1] // 2
    side = 3 * pairs // 8
    counts = (pairs - 2 * side, side, side)
    angles = jnp.concatenate(
        [
            coordinates[..., axis, None] * (10_000.0 ** -(jnp.arange(count) / count))[None, None]
            for axis, count in enumerate(counts)
        ],
        axis=-1,
    )[:, :, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return x * cos + _partners(x) * sin


def _partners(x: Float[Array, "b n heads d"]) -> Float[Array, "b n heads d"]:
    """The halves of the features, the second first.

    On CPUs by a product with a permutation: XLA's loops that take features apart and put them together again are slow
    there; the gradients of `configs/walt_demo.py` take 1.1 times as long with them.
    """
    pairs = x.shape[-1] // 2
    if on_cpu():
        with jax.named_scope(MOVES):
            return x @ jnp.roll(jnp.eye(2 * pairs, dtype=x.dtype), pairs, axis=0)
    return jnp.concatenate([x[..., pairs:], x[..., :pairs]], axis=-1)


@jax.custom_vjp
def attend(
    query: Float[Array, "b q heads d"],
    key: Float[Array, "b k heads d"],
    value: Float[Array, "b k heads d"],
    bias: Float[Array, "#b heads q k"] | None = None,
    mask: Bool[Array, "#b 1 #q k"] | None = None,
) -> tuple[Float[Array, "b q heads d"], Float[Array, "b q heads"]]:
    """Attention, and the logarithm of the sum that its softmax divides by, both differentiable, the sum in float32.

    (`jax.nn.dot_product_attention` stops the gradient of that sum, which `joined` needs.) The gradient is computed from
    the exponentials (Dao et al. 2022): XLA's own has more passes over all pairs and takes 1.5 times as long.
    """
    return _attend_forward(query, key, value, bias, mask)[0]


def _attend_forward(query, key, value, bias, mask):
    query = query * query.shape[-1] ** -0.5  # rather than the logits, of which there are many more
    query, key, value = (rearrange(x, "b n heads d -> b heads n d") for x in (query, key, value))
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    most = logits.max(-1, keepdims=True)
    exponentials = jnp.exp(logits - most)
    total = exponentials.sum(-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", exponentials, value, preferred_element_type=jnp.float32) / total
    out, logsum = out.astype(value.dtype), (most + jnp.log(total))[..., 0]
    residuals = query, key, value, bias, mask, exponentials, total, out
    return (rearrange(out, "b heads q d -> b q heads d"), rearrange(logsum, "b heads q -> b q heads")), residuals


def _attend_backward(residuals, gradients):
    query, key, value, bias, mask, exponentials, total, out = residuals
    slope = rearrange(gradients[0], "b q heads d -> b heads q d")
    # The part of the gradient that all logits of a row share: through the softmax's sum and through the returned one.
    common = (slope.astype(jnp.float32) * out).sum(-1) - rearrange(gradients[1], "b q heads -> b heads q")
    slope = slope / total
    value_slope = jnp.einsum("bhqk,bhqd->bhkd", exponentials, slope.astype(value.dtype))
    logits = jnp.einsum("bhqd,bhkd->bhqk", slope.astype(value.dtype), value, preferred_element_type=jnp.float32)
    logits = exponentials * (logits - common[..., None] / total)
    if mask is not None:
        logits = jnp.where(mask, logits, 0)
    bias_slope = None
    if bias is not None:
        bias_slope = logits.sum(0, keepdims=True) if len(bias) == 1 else logits
        bias_slope = bias_slope.astype(bias.dtype)
    logits = logits.astype(query.dtype)
    query_slope = jnp.einsum("bhqk,bhkd->bhqd", logits, key) * query.shape[-1] ** -0.5
    key_slope = jnp.einsum("bhqk,bhqd->bhkd", logits, query)
    slopes = (rearrange(x, "b heads n d -> b n heads d") for x in (query_slope, key_slope, value_slope))
    return *slopes, bias_slope, None


attend.defvjp(_attend_forward, _attend_backward)


Attended = tuple[Float[Array, "b n heads d"], Float[Array, "b n heads"]]


def attend_within(
    query: Float[Array, "b q heads d"],
    key: Float[Array, "b k heads d"],
    value: Float[Array, "b k heads d"],
    segments: tuple[Int[Array, "#b #q"], Int[Array, "b k"]] | None = None,
    table: Float[Array, "offsets heads"] | None = None,
    coordinates: Int[Array, "b n 3"] | Int[np.ndarray, "1 n 3"] | None = None,
    bounds: Grid | None = None,
    order: Grid | None = None,
) -> Attended:
    """`attend` within segments, with Swin's relative bias: fused on TPUs and GPUs, by XLA elsewhere.

    Args:
        segments: of queries and of keys; a query sees the keys of its segment. None: all keys.
        table: a bias for each offset (t, y, x) within `bounds`.
        coordinates: (t, y, x) of the tokens, windows starting at multiples of `bounds`. In NumPy they are those of a
            whole window, equal for all rows, in raster order or part by part.
        bounds: the largest size of a window.
        order: the sizes of these parts; None is raster order.
    """
    if holds(*query.shape[2:], 0 if table is None else math.prod(bounds), query.dtype):
        bias = places = None
        if isinstance(coordinates, np.ndarray):
            bias = expanded(table, bounds, tuple(coordinates[0].max(0) + 1), order)
        elif table is not None:
            bias, place = expanded(table, bounds, bounds), jnp.zeros((), jnp.int32)
            for axis, size in enumerate(bounds):
                place = place * size + coordinates[..., axis] % size
            places = place, place
        bias = bias if bias is None else bias.astype(query.dtype)
        return sharded(query, key, value, bias, places, segments)
    bias = mask = None
    if table is not None:
        index = relative_index(coordinates, coordinates, bounds)
        if segments is not None:
            index = jnp.clip(index, 0, len(table) - 1)  # of windows that share a row and are masked
        bias = rearrange(table[index], "r q k heads -> r heads q k").astype(query.dtype)
    if segments is not None:
        mask = (segments[0][:, :, None] == segments[1][:, None])[:, None]
    return attend(query, key, value, bias, mask)


def expanded(
    table: Float[Array, "offsets heads"], bounds: Grid, sizes: Grid, order: Grid | None = None
) -> Float[Array, "heads n n"]:
    """The relative bias between all tokens of a window, which are in raster order or in parts of sizes `order`.

    Products with one-hot matrices: on TPUs, the gradient of a gather would be a slow scatter.
    """
    table = table.reshape(*(2 * bound - 1 for bound in bounds), -1)
    axes = [
        np.eye(2 * bound - 1, dtype=np.float32)[np.arange(size)[:, None] - np.arange(size) + bound - 1]
        for bound, size in zip(bounds, sizes, strict=True)
    ]
    bias = jnp.einsum("abch,tsa,yub,xvc->htyxsuv", table, *axes, precision=jax.lax.Precision.HIGHEST)
    if order is not None and order != sizes:
        a, b, c = order
        pattern = "h (t a) (y b) (x c) (s d) (u e) (v f) -> h t y x a b c s u v d e f"
        bias = rearrange(bias, pattern, a=a, b=b, c=c, d=a, e=b, f=c)
    return bias.reshape(len(bias), math.prod(sizes), math.prod(sizes))


def joined(one: Attended, other: Attended) -> Float[Array, "b n heads d"]:
    """Attention over the keys of both, from the attention over each."""
    (x, x_sum), (y, y_sum) = one, other
    share = jax.nn.sigmoid(x_sum - y_sum)[..., None].astype(x.dtype)
    return y + share * (x - y)


def reshaped(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b n heads d"],
    value: Float[Array, "b n heads d"],
    window: Window,
    layout: Layout,
    table: Float[Array, "offsets heads"] | None,
    bounds: Grid,
) -> Attended:
    """The route for equal clips: windows are rows of the batch."""
    grid, sizes = layout.grid, window.sizes(layout.grid)
    coordinates = None if table is None else raster(sizes)[None]
    order = layout.order if parts() == 1 else None

    def whole_windows(query, key, value, table):
        own = coordinates if order is None or table is None else in_windows(coordinates, order, sizes)
        rows = [x.reshape(-1, math.prod(sizes), *x.shape[2:]) for x in (query, key, value)]
        out, logsum = attend_within(*rows, None, table, own, bounds, order)
        return out.reshape(query.shape), logsum.reshape(query.shape[:-1])

    def in_several_frames(query, key, value, table):
        """Windows of which each frame has a part in one piece."""
        count = grid[1] * grid[2] // (sizes[1] * sizes[2])
        rows = [x.reshape(len(x), grid[0], count, -1, *x.shape[2:]) for x in (query, key, value)]
        bias = None if table is None else expanded(table, bounds, sizes).astype(query.dtype)
        out, logsum = sharded_windows(*rows, bias)
        return out.reshape(query.shape), logsum.reshape(query.shape[:-1])

    def some_heads(query, key, value, table):
        rows = [partition(layout.to_raster(x), sizes, grid) for x in (query, key, value)]
        out, logsum = attend_within(*rows, None, table, coordinates, bounds)
        return tuple(layout.from_raster(merge(x, sizes, grid)) for x in (out, logsum))

    arguments = query, key, value, table
    if order is not None and sizes == (1, *grid[1:]):
        return whole_windows(*arguments)
    if order is not None and sizes == (grid[0], *order[1:]):
        places = 0 if table is None else math.prod(sizes)
        if holds(*query.shape[2:], places, query.dtype):
            return in_several_frames(*arguments)
    if parts() == 1:
        return some_heads(*arguments)
    if whole(sizes, layout):
        return on_each_device(whole_windows, arguments, (*[("batch", "tokens", "heads")] * 3, (None, "heads")))
    check_heads(query.shape[2])
    return on_each_device(some_heads, arguments, (*[("batch", None, "heads")] * 3, (None, "heads")))


@jax.custom_vjp
def rearranged(x: Float[Array, "n d"], there: Int[Array, " m"], back: Int[Array, " n"]) -> Float[Array, "m d"]:
    """Row `there[i]` of x for each i, zeros for an index out of range; `back` is the place of each row of x.

    The gradient is a gather as well; XLA's own would be a scatter.
    """
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


def _rearranged_forward(x, there, back):
    return rearranged(x, there, back), (there, back)


def _rearranged_backward(residuals, gradient):
    there, back = residuals
    return rearranged(gradient, back, there), None, None


rearranged.defvjp(_rearranged_forward, _rearranged_backward)


def _moved(x: Float[Array, "b n *k"], there: Int[Array, " m"], back: Int[Array, " bn"]) -> Float[Array, "m *k"]:
    """`rearranged` for tokens with features of any shape."""
    flat = rearranged(x.reshape(x.shape[0] * x.shape[1], -1), there, back)
    return flat.reshape(len(there), *x.shape[2:])


def _numbered_through(index: Int[Array, "shards *k"], size: int) -> Int[Array, " n"]:
    """Numbers below `size` in each data shard as numbers through all of these shards; `size` stays out of range."""
    shards = len(index)
    index = index.reshape(shards, -1)
    first = size * jnp.arange(shards, dtype=index.dtype)[:, None]
    return jnp.where(index < size, index + first, shards * size).reshape(-1)


def to_slots(x: Shaped[Array, "b n k"], groups: Groups) -> Shaped[Array, "shards slots k"]:
    """Tokens of packs in the slots of their windows' rows, see `grouping`; zeros where a slot is empty."""

    def of_shards(x, groups):
        shards, slots = groups.slots.shape
        there = _numbered_through(groups.slots, groups.place.shape[1])
        return _moved(x, there, _numbered_through(groups.place, slots)).reshape(shards, slots, -1)

    return on_each_device(of_shards, (x, groups), (("batch",), ("batch",)))


def from_slots(x: Float[Array, "shards slots heads d"], groups: Groups, tokens: int) -> Float[Array, "b n heads d"]:
    """Back from the slots of rows to packs of so many tokens; zeros for padding."""

    def of_shards(x, groups):
        there = _numbered_through(groups.slots, groups.place.shape[1])
        back = _numbered_through(groups.place, groups.slots.shape[1])
        return _moved(x, back, there).reshape(-1, tokens, *x.shape[2:])

    return on_each_device(of_shards, (x, groups), (("batch", None, "heads"), ("batch",)))


def grouped(
    query: Float[Array, "shards slots heads d"],
    key: Float[Array, "shards slots heads d"],
    value: Float[Array, "shards slots heads d"],
    groups: Groups,
    coordinates: Int[Array, "shards slots 3"],
    table: Float[Array, "offsets heads"] | None,
    bounds: Grid,
    text_query: Float[Array, "shards slots heads d"] | None = None,
    text_key: Float[Array, "b s m heads d"] | None = None,
    text_value: Float[Array, "b s m heads d"] | None = None,
    text_mask: Bool[Array, "b s m"] | None = None,
) -> Float[Array, "shards slots heads d"]:
    """The route for packs: attention in rows of slots, see `grouping`, to windows and to the texts of a row's clips.

    Args:
        query, key: with rotary embedding, if there is one.
        text_query: without it; None, as the following, if there is no text, nor other keys that all of a clip see.
    """
    check_heads(query.shape[2])
    heads, of_texts = ("batch", None, "heads"), ("batch", None, None, "heads")
    return on_each_device(
        functools.partial(_grouped_shards, bounds=bounds),
        (query, key, value, groups, coordinates, table, text_query, text_key, text_value, text_mask),
        (heads, heads, heads, ("batch",), ("batch",), (None, "heads"), heads, of_texts, of_texts, ("batch",)),
    )


def _grouped_shards(
    query, key, value, groups, coordinates, table, text_query, text_key, text_value, text_mask, bounds: Grid
) -> Array:
    """`grouped` for some of the data shards and heads."""
    lengths, numbers, clips = zip(*groups.rows, strict=True)

    def in_rows(x, lengths=lengths):
        """Of each kind of row `[rows, length, …]`."""
        ends = np.cumsum(np.multiply(lengths, numbers))[:-1].tolist()
        split = zip(jnp.split(x, ends, axis=1), lengths, strict=True)
        return [part.reshape(-1, length, *x.shape[2:]) for part, length in split]

    windows = in_rows(groups.slot_window)
    places = [None] * len(lengths) if table is None else in_rows(coordinates)
    found = [
        attend_within(*of_length, (window, window), table, place, bounds)
        for *of_length, window, place in zip(*map(in_rows, (query, key, value)), windows, places, strict=True)
    ]
    if text_query is None:
        outs = [out for out, _ in found]
    else:
        if not all(clips):
            raise ValueError(f"rows of {groups.rows} have no room for text: name their window in `PackRows.choose`")
        shards, of_shard = len(groups.slots), text_mask.shape[0] * text_mask.shape[1] // len(groups.slots)
        first = of_shard * jnp.arange(shards, dtype=jnp.int32)[:, None]
        of_rows = _numbered_through(groups.row_clips, of_shard).reshape(shards, -1)
        of_slots = jnp.where(groups.slot_clip < 0, -1, groups.slot_clip + first)
        outs = [
            joined(own, _attend_to_rows_texts(q, text_key, text_value, text_mask, slot_clips, row_clips))
            for own, q, slot_clips, row_clips in zip(
                found, in_rows(text_query), in_rows(of_slots), in_rows(of_rows, clips), strict=True
            )
        ]
    shards = len(groups.slots)
    return jnp.concatenate([out.reshape(shards, -1, *out.shape[2:]) for out in outs], axis=1)


def _attend_to_rows_texts(
    query: Float[Array, "rows n heads d"],
    key: Float[Array, "b s m heads d"],
    value: Float[Array, "b s m heads d"],
    mask: Bool[Array, "b s m"],
    slot_clips: Int[Array, "rows n"],
    row_clips: Int[Array, "rows k"],
) -> Attended:
    """Each token of a row over its clip's text, which is among those of the row's clips."""

    def of_rows(x):
        return jnp.take(x.reshape(-1, *x.shape[2:]), row_clips, axis=0, mode="fill", fill_value=0)

    segments = jnp.where(of_rows(mask), row_clips[..., None], -1)
    keys = (rearrange(of_rows(x), "rows k m heads d -> rows (k m) heads d") for x in (key, value))
    return attend_within(query, *keys, (slot_clips, rearrange(segments, "rows k m -> rows (k m)")))


def attend_to_text(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b s m heads d"],
    value: Float[Array, "b s m heads d"],
    mask: Bool[Array, "b s m"],
    rows: TextRows | None,
) -> Attended:
    """Each token over its clip's text; with `rows` in packs of several clips."""
    mask = jnp.where(mask, 0, -1)
    if rows is None:

        def own(query, key, value, mask):
            return attend_within(query, key, value, (jnp.zeros((1, 1), jnp.int32), mask))

        arguments = query, key[:, 0], value[:, 0], mask[:, 0]
        if parts() == 1 or query.shape[1] % parts():
            return own(*arguments)
        return on_each_device(
            own, arguments, (("batch", "tokens", "heads"), *[("batch", None, "heads")] * 2, ("batch",))
        )
    heads = ("batch", None, None, "heads")
    names = ("batch", None, "heads"), heads, heads, ("batch",), ("batch",)
    return on_each_device(_text_of_shards, (query, key, value, mask, rows), names)


def _text_of_shards(query, key, value, mask, rows: TextRows) -> Attended:
    """`attend_to_text` for some of the data shards and heads."""
    (batch, tokens, heads, features), (shards, number, length) = query.shape, rows.slots.shape
    there = _numbered_through(rows.slots, batch * tokens // shards)
    back = _numbered_through(rows.place, number * length)
    clip = _numbered_through(rows.clip, batch * key.shape[1] // shards)
    q = _moved(query, there, back).reshape(shards * number, length, heads, features)
    key, value, mask = (x.reshape(-1, *x.shape[2:])[clip] for x in (key, value, mask))
    out, logsum = attend_within(q, key, value, (jnp.zeros((1, 1), jnp.int32), mask))
    out = rearranged(out.reshape(shards * number * length, -1), back, there).reshape(query.shape)
    return out, rearranged(logsum.reshape(shards * number * length, -1), back, there).reshape(batch, tokens, heads)


def isolated(
    query: Float[Array, "b n heads d"],
    key: Float[Array, "b n heads d"],
    value: Float[Array, "b n heads d"],
    table: Float[Array, "offsets heads"] | None,
) -> Attended:
    """Each token over itself: identity attention."""
    logsum = jnp.einsum("bnhd,bnhd->bnh", query, key, preferred_element_type=jnp.float32) / query.shape[-1] ** 0.5
    if table is not None:
        logsum = logsum + table[len(table) // 2][None, None].astype(jnp.float32)  # of no offset
    return value, logsum


def attend_to_clips(
    query: Float[Array, "b sm heads d"],
    extra_key: Float[Array, "b sm heads d"],
    extra_value: Float[Array, "b sm heads d"],
    key: Float[Array, "b n heads d"],
    value: Float[Array, "b n heads d"],
    mask: Bool[Array, "b s m"],
    layout: Layout,
) -> Float[Array, "b sm heads d"]:
    """Extra tokens, see `ExtraTokens`, over all tokens of their clips and each other."""
    batch, clips, length = mask.shape
    clip = jnp.repeat(jnp.arange(clips), length)[None]
    extra_clip = jnp.where(mask.reshape(batch, -1), clip, -1)
    own = jnp.broadcast_to(layout.clip_numbers(), key.shape[:2])
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((key, extra_key), (value, extra_value)))
    return attend_within(query, keys, values, (clip, jnp.concatenate([own, extra_clip], axis=1)))[0]


@flax.struct.dataclass
class ExtraTokens:
    """Tokens that embed clips' conditions: m of each clip, after all of the sequence's own, clip by clip.

    All tokens of a clip see them, and they see all of the clip.

    Attributes:
        mask: which of them are there.
    """

    mask: Bool[Array, "b s m"]


class WindowAttention(nn.Module):
    """Each token attends to its window's tokens and, where there is text, to all of its clip's text tokens.

    With text this is W.A.L.T's cross-attention, k = v = concat[q, text]; without, its self-attention.

    Attributes:
        heads: attention heads.
        windows: which tokens see each other; heads are divided among several; none is for text only.
        bounds: the largest size of each window; `relative` has a bias for each offset in it.
        relative: "bias" for Swin's learned bias an offset, "rotary", or "none".
        qk_norm: whether queries and keys are normalised (ViT-22B): logits stay bounded whatever the weights do.
        bias: which layers have one: "none", "out", or "all".
        dtype: of the computation.
        qkv_init, out_init: how kernels are drawn.
    """

    heads: int
    windows: tuple[Window, ...]
    bounds: tuple[Grid, ...]
    relative: Relative
    qk_norm: bool
    bias: Literal["none", "out", "all"]
    dtype: jnp.dtype
    qkv_init: Initializer = nn.initializers.lecun_normal()
    out_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        layout: Layout,
        text: Float[Array, "b s m d"] | None = None,
        text_mask: Bool[Array, "b s m"] | None = None,
        isolate_images: bool = False,
        extra: ExtraTokens | None = None,
    ) -> Float[Array, "b n d"]:
        """With `isolate_images`, tokens of clips of one frame see only themselves in windows that span time."""
        dim = x.shape[-1]
        exchange = extra is None and exchangeable(layout, self.windows)
        if exchange:
            sizes = self.windows[0].sizes(layout.grid)
            x, layout = to_windows(x, sizes, layout.grid), layout.replace(order=sizes)

        def project(name):
            use_bias = self.bias == "all"
            return Linear(dim, ("embed", "heads"), use_bias, self.qkv_init, self.dtype, name=name)

        def norm(name):
            return HeadNorm(self.heads, self.dtype, name=name) if self.qk_norm else lambda y: y

        def heads(y):
            return rearrange(y, "... (heads d) -> ... heads d", heads=self.heads)

        def of_tokens(y):
            return constrain(y, "batch", "tokens", "heads")  # moved after the projection, not before

        def out(y):
            y = rearrange(constrain(y, "batch", "tokens", "heads"), "b n heads d -> b n (heads d)")
            use_bias = self.bias != "none"
            y = Linear(dim, ("heads", "embed"), use_bias, self.out_init, self.dtype, name="out")(y)
            return from_windows(y, layout.order, layout.grid) if exchange else y

        to_query, to_key, to_value = map(project, ("query", "key", "value"))
        query_norm, key_norm = norm("query_norm"), norm("key_norm")

        def projected(x):
            query, key = query_norm(of_tokens(to_query(x))), key_norm(of_tokens(to_key(x)))
            return tuple(heads(y) for y in (query, key, of_tokens(to_value(x))))

        others = None
        if text is not None:
            others = heads(key_norm(to_key(text))), heads(to_value(text)), text_mask
        if not self.windows:
            # A clip without any text adds nothing, rather than the mean of its padding.
            any_text = layout.spread(text_mask.any(-1)[..., None].astype(self.dtype))[..., None]
            rows = None if layout.pack is None else layout.pack.text
            if layout.pack is not None and rows is None:
                raise ValueError("the pack has no rows for text: choose them with `text_alone`")
            query = heads(query_norm(of_tokens(to_query(x))))
            return out(any_text * attend_to_text(query, *others, rows)[0])
        if extra is not None:
            own = x.shape[1] - extra.mask.shape[1] * extra.mask.shape[2]
            extra_parts, x = projected(x[:, own:]), x[:, :own]
            each = (rearrange(y, "b (s m) ... -> b s m ...", s=extra.mask.shape[1]) for y in extra_parts[1:])
            others = *each, extra.mask
        if layout.pack is None:
            y, key, value = self._in_windows(*projected(x), others, layout, isolate_images)
        else:
            y, key, value = self._in_packs(x, projected, others, layout, extra is not None)
        if extra is not None:
            y = jnp.concatenate([y, attend_to_clips(*extra_parts, key, value, extra.mask, layout)], axis=1)
        return out(y)

    def _turned(self, query: Array, key: Array, coordinates: Array) -> tuple[Array, Array]:
        """With rotary embedding, if there is one."""
        return tuple(rotate(y, coordinates) if self.relative == "rotary" else y for y in (query, key))

    def _table(self, number: int) -> Float[Array, "offsets heads"] | None:
        """The relative bias of a window's heads."""
        if self.relative != "bias":
            return None
        count = len(self.windows)
        table_init = nn.with_logical_partitioning(nn.initializers.zeros, (*["relative"] * 3, "heads"))
        offsets = [2 * size - 1 for size in self.bounds[number]]  # an axis each, which `resize` interpolates along
        name = f"relative_bias_{number}" if number else "relative_bias"
        return self.param(name, table_init, (*offsets, self.heads // count)).reshape(-1, self.heads // count)

    def _heads_of(self, number: int, y: Array) -> Array:
        """A window's part of the heads, which are the axis before the last."""
        count = len(self.windows)
        return y if count == 1 else jnp.split(y, count, axis=-2)[number]

    def _in_windows(
        self, query: Array, key: Array, value: Array, others: tuple | None, layout: Layout, isolate_images: bool
    ) -> tuple[Array, Array, Array]:
        """Attention over each token's window and others' keys, heads divided among the windows; keys and values."""
        turned, found = self._turned(query, key, layout.coordinates()), []
        for number, (window, bounds) in enumerate(zip(self.windows, self.bounds, strict=True)):
            part, table = [self._heads_of(number, y) for y in (*turned, value)], self._table(number)
            if isolate_images and window.time != 1 and layout.grid[0] == 1:
                found.append(isolated(*part, table))
            else:
                found.append(reshaped(*part, window, layout, table, bounds))
        attended = tuple(jnp.concatenate(each, axis=2) for each in zip(*found, strict=True))
        y = attended[0] if others is None else joined(attended, attend_to_text(query, *others, None))
        return y, key, value

    def _in_packs(
        self, x: Array, projected: Any, others: tuple | None, layout: Layout, keys_too: bool
    ) -> tuple[Array, Array | None, Array | None]:
        """As `_in_windows`. Tokens move once, before they are projected, and the output back."""
        found = []
        for number, (window, bounds) in enumerate(zip(self.windows, self.bounds, strict=True)):
            groups = layout.pack.groups[window.name]
            slots = constrain(to_slots(x, groups), "batch", "tokens", "embed")
            coordinates = to_slots(layout.coordinates(), groups)
            query, key, value = (self._heads_of(number, y) for y in projected(slots))
            text = ()
            if others is not None:
                text = query, *(self._heads_of(number, y) for y in others[:2]), others[2]
            turned = self._turned(query, key, coordinates)
            y = grouped(*turned, value, groups, coordinates, self._table(number), bounds, *text)
            back = (y, key, value) if keys_too else (y,)
            found.append([from_slots(y, groups, x.shape[1]) for y in back])
        y, *keys = (jnp.concatenate(each, axis=2) for each in zip(*found, strict=True))
        return y, *(keys or (None, None))
