"""Fused attention for GPUs, in Pallas for Triton: the matrix of all pairs of tokens is never in memory.

As FlashAttention-2 (Dao 2023): a program takes a block of queries of one row and head, keys pass in blocks, and the
softmax is rescaled while they do. The gradient is computed from the logarithm of the softmax's sum, by a kernel that
sums over keys for each block of queries and one that sums over queries for each block of keys. That logarithm has a
gradient too: all logits of a query share Σ out · d out − d logsum.

The gradient of the bias is summed over rows by a third kernel, which computes the pairs again: a program takes a block
of the bias and passes through all rows, so nothing is added atomically and a sum does not depend on the order in which
programs run. With `places`, a row's tokens are visited in the order of their places, so that those of a block are
consecutive, and a product with one-hot matrices adds each pair where it belongs.

Never run on a GPU yet. What is known is that it computes the right numbers when interpreted, and that XLA and Triton
compile it for GPUs, see docs/attention.md.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from walt_jax.denoiser.kernels import MASKED, Pair

LARGEST = 128  # features of a head, for which the blocks below fit the shared memory of a multiprocessor
PLACES = 2048  # the bias and its gradient are in memory, 0.3 GB in float32 for 16 heads
SMALLEST = 16  # side of a matrix product
PROGRAMS = 512  # to keep a GPU of 132 multiprocessors busy, where rows can be divided among programs
LOG2_E = math.log2(math.e)  # logits are in units of log 2: GPUs have an instruction for powers of 2


def fused(
    query: Float[Array, "b q heads d"],
    key: Float[Array, "b k heads d"],
    value: Float[Array, "b k heads d"],
    bias: Float[Array, "heads q k"] | Float[Array, "heads p p"] | None = None,
    places: Pair | None = None,
    segments: Pair | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b q heads d"], Float[Array, "b q heads"]]:
    """Attention, and the logarithm of the sum that its softmax divides by; both are differentiable.

    As `attend`, but a query that sees no key gets zeros.

    Args:
        bias: added to the logits of all rows, or with `places` between two places rather than a query and a key.
        places: of queries and keys, in [0, p).
        segments: of queries and keys. A query sees the keys of its segment; None: all keys.
        interpret: whether the kernels are interpreted rather than compiled.
    """
    places, segments = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), (places, segments))
    out, logsum = _attention(interpret, query, key, value, bias, places, segments)
    return out, rearrange(logsum, "b heads q -> b q heads")


def holds(features: int, places: int) -> bool:
    """Whether there are blocks for heads of so many features, and memory for a bias between so many places."""
    return features <= LARGEST and places <= PLACES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret, query, key, value, bias, places, segments):
    return _forward(interpret, query, key, value, bias, places, segments)[0]


def _forward(interpret, query, key, value, bias, places, segments):
    (batch, queries, heads, features), keys = query.shape, key.shape[1]
    inputs = {"q": query, "k": key, "v": value, "bias": bias, "places": places, "segments": segments}
    blocks = _blocks(128 if places is None or features <= 64 else 64, 64, queries, keys, query.dtype)
    outputs = {"q": query, "sum": jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)}
    grid = pl.cdiv(queries, blocks[0]), heads, batch
    found = _call(_forward_kernel, blocks, grid, inputs, outputs, 2, interpret)
    return (found["q"], found["sum"]), (query, key, value, bias, places, segments, found["q"], found["sum"])


def _backward(interpret, residuals, slopes):
    query, key, value, bias, places, segments, out, logsum = residuals
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    slope = slopes[0]
    # What all logits of a query share: through the softmax's sum and through the returned one.
    common = jnp.einsum("bnhd,bnhd->bhn", slope.astype(jnp.float32), out.astype(jnp.float32)) - slopes[1]
    # A query that sees nothing has no weights, rather than those of a softmax over equal logits.
    logsum = jnp.where(logsum > MASKED / 2, logsum * LOG2_E, jnp.inf)
    inputs = {"q": query, "k": key, "v": value, "bias": bias, "places": places, "segments": segments}
    inputs |= {"slope": slope, "sum": logsum, "common": common}
    blocks = _blocks(64, 64, queries, keys, query.dtype)
    grid = pl.cdiv(queries, blocks[0]), heads, batch
    found = _call(_query_kernel, blocks, grid, inputs, {"q": query}, 1, interpret)
    grid = pl.cdiv(keys, blocks[1]), heads, batch
    found |= _call(_key_kernel, blocks, grid, inputs, {"k": key, "v": value}, 3, interpret)
    bias_slope = None if bias is None else _bias_slope(inputs, interpret)
    return found["q"], found["k"], found["v"], bias_slope, None, None


_attention.defvjp(_forward, _backward)


def _bias_slope(inputs: dict, interpret: bool) -> Float[Array, "heads p p"]:
    """The gradient of the bias; the rows are divided among programs where its blocks are few."""
    bias, (batch, _, heads, _) = inputs["bias"], inputs["q"].shape
    blocks = _blocks(64, 64, *bias.shape[1:], inputs["q"].dtype)
    counts = tuple(pl.cdiv(size, block) for size, block in zip(bias.shape[1:], blocks, strict=True))
    wanted = min(batch, pl.cdiv(PROGRAMS, heads * math.prod(counts)))
    parts = next(n for n in range(wanted, batch + 1) if batch % n == 0)
    if inputs["places"] is not None:
        # Tokens by place, and how many of a row come before each block of places.
        sides = list(zip(inputs["places"], blocks, counts, strict=True))
        inputs = inputs | {"order": tuple(jnp.argsort(place, axis=1).astype(jnp.int32) for place, _, _ in sides)}
        inputs["starts"] = tuple(
            (place[:, :, None] < block * jnp.arange(count + 1)[None, None]).sum(1, dtype=jnp.int32)
            for place, block, count in sides
        )
    outputs = {"bias": jax.ShapeDtypeStruct((parts, *bias.shape), jnp.float32)}
    grid = math.prod(counts), heads, parts
    found = _call(_bias_kernel, blocks, grid, inputs, outputs, 0, interpret)
    return found["bias"].sum(0).astype(bias.dtype)


def _blocks(queries: int, keys: int, all_queries: int, all_keys: int, dtype: Any) -> tuple[int, int]:
    """Queries and keys of a block: as many as these of 16 bits, half of more; no larger than all need."""
    share = max(1, jnp.dtype(dtype).itemsize // 2)
    pairs = (queries, all_queries), (keys, all_keys)
    return tuple(max(SMALLEST, min(block // share, pl.next_power_of_2(size))) for block, size in pairs)


def _call(kernel, blocks, grid, inputs: dict, outputs: dict, products: int, interpret: bool) -> dict[str, Array]:
    """Runs a kernel on whole arrays, of which it loads what it needs.

    Args:
        blocks: queries and keys of a block.
        grid: blocks, heads and rows.
        inputs: by name; None for what there is not.
        outputs: arrays of this shape and type.
        products: of all queries and keys, not counting those that are computed again.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}
    (batch, queries, heads, features), keys = inputs["q"].shape, inputs["k"].shape[1]
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks),
        grid=grid,
        out_shape={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()},
        # Four warps multiply 64 rows at a time; fewer than eight would have too few registers for larger blocks.
        compiler_params=triton.CompilerParams(num_warps=4 if max(*blocks, features) <= 64 else 8, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * queries * keys * heads * features,
            transcendentals=batch * heads * queries * keys,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))),
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(inputs)


def _forward_kernel(inputs, outputs, *, blocks):
    part, head, row = (pl.program_id(axis) for axis in range(3))
    q = _queries(inputs, row, head, *_block(part, blocks[0], inputs["q"]))

    def step(number, carried):
        out, most, total = carried
        k = _keys(inputs, row, head, *_block(number, blocks[1], inputs["k"]))
        logits = _logits(inputs, head, q, k, 0)
        larger = jnp.maximum(most, logits.max(1))
        exponentials, shrinks = jnp.exp2(logits - larger[:, None]), jnp.exp2(most - larger)
        product = _product(exponentials.astype(k["v"].dtype), k["v"], 1, 0)
        return out * shrinks[:, None] + product, larger, total * shrinks + exponentials.sum(1)

    start = jnp.zeros(q["q"].shape, jnp.float32), jnp.full(blocks[:1], MASKED), jnp.zeros(blocks[0], jnp.float32)
    out, most, total = jax.lax.fori_loop(0, pl.cdiv(inputs["k"].shape[1], blocks[1]), step, start)
    share = jnp.where(most > MASKED / 2, 1 / total, 0)
    _store_rows(outputs["q"], row, head, q, out * share[:, None])
    triton.store(outputs["sum"].at[row, head, q["at"]], most / LOG2_E + jnp.log(total), mask=q["inside"])


def _query_kernel(inputs, outputs, *, blocks):
    part, head, row = (pl.program_id(axis) for axis in range(3))
    q = _queries(inputs, row, head, *_block(part, blocks[0], inputs["q"]))

    def step(number, total):
        k = _keys(inputs, row, head, *_block(number, blocks[1], inputs["k"]))
        _, logits = _slopes(inputs, head, q, k, 0)
        return total + _product(logits.astype(k["k"].dtype), k["k"], 1, 0)

    start = jnp.zeros(q["q"].shape, jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(inputs["k"].shape[1], blocks[1]), step, start)
    _store_rows(outputs["q"], row, head, q, total * inputs["q"].shape[3] ** -0.5)


def _key_kernel(inputs, outputs, *, blocks):
    part, head, row = (pl.program_id(axis) for axis in range(3))
    k = _keys(inputs, row, head, *_block(part, blocks[1], inputs["k"]))

    def step(number, carried):
        keys, values = carried
        q = _queries(inputs, row, head, *_block(number, blocks[0], inputs["q"]))
        weights, logits = _slopes(inputs, head, q, k, 1)
        values = values + _product(weights.astype(q["slope"].dtype), q["slope"], 1, 0)
        return keys + _product(logits.astype(q["q"].dtype), q["q"], 1, 0), values

    start = jnp.zeros(k["k"].shape, jnp.float32), jnp.zeros(k["k"].shape, jnp.float32)
    keys, values = jax.lax.fori_loop(0, pl.cdiv(inputs["q"].shape[1], blocks[0]), step, start)
    _store_rows(outputs["k"], row, head, k, keys / LOG2_E)
    _store_rows(outputs["v"], row, head, k, values)


def _bias_kernel(inputs, outputs, *, blocks):
    number, head, part = (pl.program_id(axis) for axis in range(3))
    across = pl.cdiv(inputs["bias"].shape[2], blocks[1])
    places = jax.lax.div(number, across), jax.lax.rem(number, across)  # which block of queries' places, and of keys'
    rows = inputs["q"].shape[0] // outputs["bias"].shape[0]

    def of_row(index, total):
        row = part * rows + index
        if "places" not in inputs:
            q = _queries(inputs, row, head, *_block(places[0], blocks[0], inputs["q"]))
            k = _keys(inputs, row, head, *_block(places[1], blocks[1], inputs["k"]))
            return total + _slopes(inputs, head, q, k, 0)[1]
        (first_query, last_query), (first_key, last_key) = (
            [starts[row, place + n] for n in range(2)] for starts, place in zip(inputs["starts"], places, strict=True)
        )

        def of_queries(chunk, total):
            q = _queries(inputs, row, head, *_by_place(inputs, 0, row, first_query, last_query, chunk, blocks[0]))

            def of_keys(chunk, total):
                k = _keys(inputs, row, head, *_by_place(inputs, 1, row, first_key, last_key, chunk, blocks[1]))
                logits = _slopes(inputs, head, q, k, 0)[1].astype(q["q"].dtype)
                by_key = _product(logits, _one_hot(k["places"], places[1], blocks[1], q["q"].dtype), 1, 0)
                of_queries = _one_hot(q["places"], places[0], blocks[0], q["q"].dtype)
                return total + _product(of_queries, by_key.astype(q["q"].dtype), 0, 0)

            return jax.lax.fori_loop(0, _quotient(last_key - first_key, blocks[1]), of_keys, total)

        return jax.lax.fori_loop(0, _quotient(last_query - first_query, blocks[0]), of_queries, total)

    total = jax.lax.fori_loop(0, rows, of_row, jnp.zeros(blocks, jnp.float32))
    (of_queries, inside), (of_keys, others) = (
        _indices(place, block, size)
        for place, block, size in zip(places, blocks, inputs["bias"].shape[1:], strict=True)
    )
    mask = _both(None if inside is None else inside[:, None], None if others is None else others[None])
    triton.store(outputs["bias"].at[part, head, of_queries[:, None], of_keys[None]], total, mask=mask)


def _slopes(inputs, head, q: dict, k: dict, axis: int) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """The weights, and the gradient of the logits; queries are along this axis."""
    weights = jnp.exp2(_logits(inputs, head, q, k, axis) - _along(q["sum"], axis))
    one, other = (q["slope"], k["v"]) if axis == 0 else (k["v"], q["slope"])
    return weights, weights * (_product(one, other, 1, 1) - _along(q["common"], axis))


def _logits(inputs, head, q: dict, k: dict, axis: int) -> Float[Array, "m n"]:
    """Logits of all pairs in units of log 2; queries are along this axis."""
    one, other = (q["q"], k["k"]) if axis == 0 else (k["k"], q["q"])
    logits = _product(one, other, 1, 1)
    inside = None if k["inside"] is None else _along(k["inside"], 1 - axis)
    if "bias" in inputs:
        name, mask = "places", None  # places of padding are 0, which the bias has
        if "places" not in inputs:
            name, mask = "at", _both(inside, None if q["inside"] is None else _along(q["inside"], axis))
        pairs = inputs["bias"].at[head, _along(q[name], axis), _along(k[name], 1 - axis)]
        logits = logits + LOG2_E * _load(pairs, mask).astype(jnp.float32)
    seen = inside
    if "segments" in inputs:
        seen = _both(inside, _along(q["segments"], axis) == _along(k["segments"], 1 - axis))
    return logits if seen is None else jnp.where(seen, logits, MASKED)


def _queries(inputs, row, head, at: Int[Array, " n"], inside) -> dict[str, Array | None]:
    """What there is of these queries; of those not inside, zeros, which have no weights."""
    found = _tokens(inputs, 0, row, at, inside) | {"q": _load_rows(inputs["q"], row, head, at, inside)}
    found["q"] = found["q"] * (LOG2_E * inputs["q"].shape[3] ** -0.5)
    if "slope" in inputs:
        found["slope"] = _load_rows(inputs["slope"], row, head, at, inside)
        found["sum"] = _load(inputs["sum"].at[row, head, at], inside, jnp.inf)
        found["common"] = _load(inputs["common"].at[row, head, at], inside)
    return found


def _keys(inputs, row, head, at: Int[Array, " n"], inside) -> dict[str, Array | None]:
    return _tokens(inputs, 1, row, at, inside) | {
        name: _load_rows(inputs[name], row, head, at, inside) for name in ("k", "v")
    }


def _tokens(inputs, side: int, row, at: Int[Array, " n"], inside) -> dict[str, Array | None]:
    pairs = {name: inputs[name][side] for name in ("places", "segments") if name in inputs}
    return {"at": at, "inside": inside} | {name: _load(x.at[row, at], inside) for name, x in pairs.items()}


def _block(number, block: int, tokens) -> tuple[Int[Array, " n"], Array | None]:
    """Indices of a block's tokens, and which of them there are; None for all."""
    return _indices(number, block, tokens.shape[1])


def _indices(number, block: int, size: int) -> tuple[Int[Array, " n"], Array | None]:
    at = number * block + jnp.arange(block)
    return at, at < size if size % block else None


def _by_place(inputs, side: int, row, first, last, chunk, block: int) -> tuple[Int[Array, " n"], Array]:
    """Indices of some of a row's tokens, from the first to before the last in the order of their places."""
    ordered = first + chunk * block + jnp.arange(block)
    return _load(inputs["order"][side].at[row, ordered], ordered < last), ordered < last


def _one_hot(places: Int[Array, " n"], number, block: int, dtype) -> Float[Array, "n block"]:
    return (places[:, None] == number * block + jnp.arange(block)[None]).astype(dtype)


def _load(tokens, mask, other: float = 0) -> Array:
    return triton.load(tokens, mask=mask, other=None if mask is None else other)


def _load_rows(x, row, head, at: Int[Array, " n"], inside) -> Float[Array, "n d"]:
    column, mask = _columns(x, inside)
    return _load(x.at[row, at[:, None], head, column], mask)


def _store_rows(x, row, head, tokens: dict, values: Float[Array, "n d"]) -> None:
    column, mask = _columns(x, tokens["inside"])
    triton.store(x.at[row, tokens["at"][:, None], head, column], values.astype(x.dtype), mask=mask)


def _columns(x, inside) -> tuple[Int[Array, "1 d"], Array | None]:
    """Indices of features, in a power of 2, and which tokens and features there are."""
    features = x.shape[3]
    column = jnp.arange(max(SMALLEST, pl.next_power_of_2(features)))[None]
    there = column < features if features < column.shape[1] else None
    return column, _both(None if inside is None else inside[:, None], there)


def _both(one: Array | None, other: Array | None) -> Array | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _along(x: Array, axis: int) -> Array:
    return x[:, None] if axis == 0 else x[None]


def _quotient(size, block: int) -> Array:
    """Blocks of so many tokens, rounded up."""
    return jax.lax.div(size + block - 1, jnp.int32(block))


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "m n"]:
    """Matrix product over these axes, summed in float32; of float32 in full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
