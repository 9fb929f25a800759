"""Attention in packs: tokens move to rows of slots, a window's together, and back; and attention to clips' texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from walt_jax.denoiser.attend import Attended, attend_within, joined
from walt_jax.denoiser.context import check_heads, on_each_device, parts
from walt_jax.denoiser.grouping import Groups, TextRows
from walt_jax.denoiser.layout import Grid


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
