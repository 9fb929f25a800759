"""Attention of rows of queries over rows of keys, with the logarithm of the softmax's sum, which joins parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from walt_jax.denoiser.kernels import MASKED
from walt_jax.denoiser.kernels.sharded import holds, sharded
from walt_jax.denoiser.layout import Grid


def relative_index(
    query: Int[Array, "*n q 3"], key: Int[Array, "*n k 3"], bounds: tuple[int, int, int]
) -> Int[Array, "*n q k"]:
    """For each pair of a window's tokens, the index of their offset (t, y, x) among all offsets (Liu et al. 2021)."""
    offset = query[..., :, None, :] - key[..., None, :, :]
    index = 0
    for axis, size in enumerate(bounds):
        index = index * (2 * size - 1) + offset[..., axis] + size - 1
    return index


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
