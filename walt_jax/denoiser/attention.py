"""Multi-head attention within windows: a reshaped and a grouped route with equal results."""

import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from walt_jax.denoiser.attend import Attended, attend_within, expanded, isolated, joined
from walt_jax.denoiser.context import (
    check_heads,
    exchangeable,
    from_windows,
    on_each_device,
    parts,
    to_windows,
    whole,
)
from walt_jax.denoiser.head_norm import HeadNorm
from walt_jax.denoiser.kernels.sharded import holds, sharded_windows
from walt_jax.denoiser.layout import Grid, Layout, raster
from walt_jax.denoiser.packed_attention import attend_to_text, from_slots, grouped, to_slots
from walt_jax.denoiser.rotary import rotate
from walt_jax.denoiser.windows import Window, in_windows, merge, partition
from walt_jax.layers import Initializer, Linear
from walt_jax.parallel.rules import constrain

Relative = Literal["bias", "rotary", "none"]


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
