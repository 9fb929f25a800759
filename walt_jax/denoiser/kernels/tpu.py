"""Fused attention for TPUs: the matrix of all pairs of tokens stays on the chip, forward and backward.

Windows are short, so a program holds all keys of a row, and the softmax needs no rescaling while keys pass, as it does
in flash attention for long sequences. Pairs have keys along sublanes and queries along lanes: what is summed over keys
is then a row that broadcasts along sublanes, and is stored as it is. Tokens stay rows of all heads' features, as linear
layers give them, so that windows are cut by moving whole rows; a program takes as many heads as fill whole tiles, so
that head dimensions need not be multiples of 128.

The gradient is computed from the logarithm of the softmax's sum (Dao et al. 2022), which is differentiable too:
attention to text is computed separately, because its queries are not rotated and its keys belong to a clip rather than
to a window, and `attention.joined` needs the gradients of both sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from walt_jax.denoiser.kernels import ATTENDED, MASKED, Pair

LANES, SUBLANES = 128, 16  # a tile of bfloat16; float32's has 8 sublanes
PAIRS = 2**19  # at most so many pairs of tokens at once: 2 MiB in float32, of which the backward pass holds about four
PROGRAM_BYTES, ROWS = 2**19, 8  # a program takes several short rows, or its start would cost more than its work
VMEM_BYTES = 60 * 2**20  # v5p has 64 MiB, v5e and v6e 128 MiB
NOWHERE = np.iinfo(np.int32).min  # segment of keys that only fill a tile


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
        bias: added to the logits of all rows, or with `places` between two places rather than a query and a key. Its
            gradient is summed over rows on the chip.
        places: of queries and keys, in [0, p).
        segments: of queries and keys. A query sees the keys of its segment; None: all keys.
        interpret: whether the kernel is interpreted rather than compiled.
    """
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    share = next(n for n in range(max(LANES // queries, 1), 0, -1) if batch % n == 0) if queries == keys else 1
    if share > 1:  # short windows share a row, or most of a tile would be empty
        own = jnp.arange(batch, dtype=jnp.int32)[:, None] % share
        segments = (own, own) if segments is None else tuple(share * x + own for x in segments)
        segments = tuple(jnp.broadcast_to(x, (batch, queries)) for x in segments)
        if bias is not None and places is None:
            bias = jnp.tile(bias, (1, share, share))
        queries, keys = share * queries, share * keys
        rows = (query, key, value), places, segments
        (query, key, value), places, segments = jax.tree.map(lambda x: x.reshape(-1, keys, *x.shape[2:]), rows)
    if segments is None and keys % SUBLANES:
        segments = tuple(jnp.zeros(x.shape[:2], jnp.int32) for x in (query, key))
    lanes = SUBLANES if queries * keys <= PAIRS else LANES  # several blocks of queries start at whole tiles of lanes
    query, key, value = (rearrange(x, "b n heads d -> b n (heads d)") for x in (query, key, value))
    query, key, value = (_filled(x, 1, size) for x, size in ((query, lanes), (key, SUBLANES), (value, SUBLANES)))
    if bias is not None:
        bias = _filled(_filled(bias.swapaxes(1, 2), 1, SUBLANES), 2, lanes)
    places, segments = (
        None if pair is None else (_filled(pair[0][:, None], 2, lanes), _filled(pair[1][:, None], 2, SUBLANES, fill))
        for pair, fill in ((places, 0), (segments, NOWHERE))
    )
    out, logsum = _attention((heads, share, interpret), query, key, value, bias, places, segments)
    out = rearrange(out[:, :queries], "b (share n) (heads d) -> (b share) n heads d", heads=heads, share=share)
    return out, rearrange(logsum[..., :queries], "b groups heads (share n) -> (b share) n (groups heads)", share=share)


def fused_windows(
    query: Float[Array, "b t w n heads d"],
    key: Float[Array, "b t w n heads d"],
    value: Float[Array, "b t w n heads d"],
    bias: Float[Array, "heads tn tn"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t w n heads d"], Float[Array, "b t w n heads"]]:
    """`fused` in w windows a clip, each of which has n consecutive tokens of each of t frames.

    Programs read a window's tokens where they are: nothing is moved. See `holds_windows`.
    """
    heads = query.shape[-2]
    query, key, value = (rearrange(x, "b t w n heads d -> b t w n (heads d)") for x in (query, key, value))
    if bias is not None:
        bias = bias.swapaxes(1, 2)
    out, logsum = _attention((heads, 1, interpret), query, key, value, bias, None, None)
    out = rearrange(out, "b t w n (heads d) -> b t w n heads d", heads=heads)
    return out, rearrange(logsum, "b w groups heads (t n) -> b t w n (groups heads)", t=out.shape[1])


def holds_windows(frames: int, tokens: int) -> bool:
    """Whether `fused_windows` computes windows of so many frames with so many tokens in each: in a block, unpadded."""
    size = frames * tokens
    return tokens % SUBLANES == 0 and size >= LANES and size**2 <= PAIRS


def holds(heads: int, features: int, places: int, dtype: jnp.dtype) -> bool:
    """Whether a bias between so many places fits the chip: with its gradient in half of it."""
    size = _heads_together(heads, features) * places * (places + LANES)
    return size * (jnp.dtype(dtype).itemsize + 4) < VMEM_BYTES / 2


def _heads_together(heads: int, features: int) -> int:
    """How many heads a program takes, for whole tiles of features."""
    return next((n for n in range(1, heads) if heads % n == 0 and n * features % LANES == 0), heads)


def _filled(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    """x with an axis of a multiple of this."""
    widths = [(0, -size % multiple if number == axis else 0) for number, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, query, key, value, bias, places, segments):
    return _forward(options, query, key, value, bias, places, segments)[0]


def _forward(options, query, key, value, bias, places, segments):
    inputs = {"q": query, "k": key, "v": value, "bias": bias, "places": places, "segments": segments}
    heads = options[0]
    together = _heads_together(heads, query.shape[-1] // heads)
    rows, tokens = query.shape[:1], query.shape[1]
    if query.ndim == 5:
        rows, tokens = (query.shape[0], query.shape[2]), query.shape[1] * query.shape[3]
    sums = jax.ShapeDtypeStruct((*rows, heads // together, together, tokens), jnp.float32)
    found = _call(_forward_kernel, options, inputs, {"q": query, "sum": sums}, 2)
    out, logsum = (checkpoint_name(found[name], ATTENDED) for name in ("q", "sum"))
    return (out, logsum), (query, key, value, bias, places, segments, out, logsum)


def _backward(options, residuals, slopes):
    query, key, value, bias, places, segments, out, logsum = residuals
    inputs = {"q": query, "k": key, "v": value, "bias": bias, "places": places, "segments": segments}
    inputs |= {"out": out, "sum": logsum, "out_slope": slopes[0], "sum_slope": slopes[1]}
    outputs = {"q": query, "k": key, "v": value}
    if bias is not None:
        outputs["bias"] = jax.ShapeDtypeStruct(bias.shape, jnp.float32)
    found = _call(_backward_kernel, options, inputs, outputs, 4)
    if bias is not None:
        found["bias"] = found["bias"].astype(bias.dtype)
    return found["q"], found["k"], found["v"], found.get("bias"), None, None


_attention.defvjp(_forward, _backward)


def _call(kernel, options: tuple[int, int, bool], inputs: dict, outputs: dict, products: int) -> dict[str, Array]:
    """Runs a kernel over heads, rows and blocks of queries.

    Rows are `[batch, n, heads d]`, or windows of `[batch, t, w, n, heads d]`, see `fused_windows`. The blocks of a row
    are consecutive, and so are the rows of a head: gradients of keys are summed over the former, that of the bias over
    both.

    Args:
        options: heads, how many windows share a row, whether the kernel is interpreted.
        inputs: by name; None for what there is not.
        outputs: arrays of this shape and type.
        products: of all queries and keys, not counting those that are computed again.
    """
    heads, share, interpret = options
    inputs = {name: x for name, x in inputs.items() if x is not None}
    windows = inputs["q"].ndim == 5
    if windows:
        batch, frames, count, each, width = inputs["q"].shape
        queries = keys = frames * each
    else:
        (batch, queries, width), keys, count = inputs["q"].shape, inputs["k"].shape[1], 1
    together = _heads_together(heads, width // heads)
    features = together * (width // heads)
    block = queries
    if queries * keys > PAIRS:
        block = next((n for n in range(queries, 0, -LANES) if queries % n == 0 and n * keys <= PAIRS), LANES)
    most = PROGRAM_BYTES // (features * max(queries, keys) * inputs["q"].dtype.itemsize)
    rows = next(n for n in range(max(min(most, ROWS), 1), 0, -1) if batch % n == 0)
    if windows:

        def place(row):
            return jax.lax.div(row, count), jax.lax.rem(row, count)  # clips, and which of their windows

        q = k = pl.BlockSpec(
            (rows, frames, None, each, features),
            lambda head, row, part: (place(row)[0], 0, place(row)[1], 0, head),
        )
        of_sums = pl.BlockSpec((rows, None, 1, together, block), lambda head, row, part: (*place(row), head, 0, part))
    else:
        q = pl.BlockSpec((rows, block, features), lambda head, row, part: (row, part, head))
        k = pl.BlockSpec((rows, keys, features), lambda head, row, part: (row, 0, head))
        of_sums = pl.BlockSpec((rows, 1, together, block), lambda head, row, part: (row, head, 0, part))
    pair = (
        pl.BlockSpec((rows, 1, block), lambda head, row, part: (row, 0, part)),
        pl.BlockSpec((rows, 1, keys), lambda head, row, part: (row, 0, 0)),
    )
    specs = {"q": q, "k": k, "v": k, "out": q, "out_slope": q, "sum": of_sums, "sum_slope": of_sums}
    specs |= {"places": pair, "segments": pair}
    if "bias" in inputs:
        # Buffered once: the next heads' bias is not fetched before all rows are done.
        specs["bias"] = pl.BlockSpec(
            (together, *inputs["bias"].shape[1:]), lambda head, row, part: (head, 0, 0), pipeline_mode=pl.Buffered(1)
        )
    partial_sums = [pltpu.VMEM((rows, keys, features), jnp.float32)] * 2 if "k" in outputs and block < queries else []
    order = ("parallel", "arbitrary" if "bias" in outputs else "parallel", "arbitrary" if partial_sums else "parallel")
    return pl.pallas_call(
        kernel,
        grid=(heads // together, batch // rows * count, queries // block),
        in_specs=[{name: specs[name] for name in inputs}],
        out_specs={name: specs[name] for name in outputs},
        out_shape={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()},
        scratch_shapes=partial_sums,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * count * queries * keys * width // share,
            transcendentals=batch * count * heads * queries * keys,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))),
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(inputs)


def _forward_kernel(inputs, outputs):
    for row in range(inputs["q"].shape[0]):
        found = []
        for head in range(outputs["sum"].shape[2]):
            value = _of_head(inputs, outputs, "v", row, head)
            logits = _logits(inputs, outputs, row, head)
            most = logits.max(0, keepdims=True)
            exponentials = jnp.exp(logits - most)
            total = exponentials.sum(0, keepdims=True)
            share = jnp.where(most > MASKED / 2, 1 / total, 0)
            found.append(_product(value, exponentials.astype(value.dtype), 0, 0) * share)
            outputs["sum"][row, 0, head : head + 1] = most + jnp.log(total)
        _put(outputs["q"], row, _transposed(found))


def _backward_kernel(inputs, outputs, *partial_sums):
    if "bias" in outputs:

        @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
        def _():
            outputs["bias"][...] = jnp.zeros_like(outputs["bias"])

    for row in range(inputs["q"].shape[0]):
        query_slopes, key_slopes, value_slopes = [], [], []
        for head in range(inputs["sum"].shape[2]):
            names = "k", "v", "out", "out_slope"
            key, value, out, slope = (_of_head(inputs, inputs, name, row, head) for name in names)
            query = _query(inputs, inputs, row, head)
            logsum, sum_slope = (inputs[name][row, 0, head : head + 1] for name in ("sum", "sum_slope"))
            # A query that sees nothing has no weights, rather than those of a softmax over equal logits.
            weights = jnp.exp(_logits(inputs, inputs, row, head) - jnp.where(logsum > MASKED / 2, logsum, 0))
            # What all logits of a query share: through the softmax's sum and through the returned one.
            common = _line((slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(1, keepdims=True)) - sum_slope
            logits = weights * (_product(value, slope, 1, 1) - common)
            if "bias" in outputs:
                _add_to_bias(inputs, row, head, logits, outputs["bias"])
            logits = logits.astype(query.dtype)
            query_slopes.append(_product(key, logits, 0, 0) * key.shape[1] ** -0.5)
            key_slopes.append(_product(logits, query, 1, 0))
            value_slopes.append(_product(weights.astype(slope.dtype), slope, 1, 0))
        _put(outputs["q"], row, _transposed(query_slopes))
        for name, slopes, sums in zip("kv", (key_slopes, value_slopes), partial_sums or (None, None), strict=True):
            _store(jnp.concatenate(slopes, axis=1), outputs[name], row, sums)


def _of_head(inputs, sums, name: str, row: int, head: int) -> Float[Array, "n d"]:
    size = inputs[name].shape[-1] // sums["sum"].shape[2]
    own = slice(head * size, (head + 1) * size)
    if len(inputs[name].shape) == 4:  # a window in several frames
        return inputs[name][row, :, :, own].reshape(-1, size)
    return inputs[name][row, :, own]


def _query(inputs, sums, row: int, head: int) -> Float[Array, "q d"]:
    """Scaled here, for outside it would be moved through memory once more, and rather than the more numerous logits."""
    query = _of_head(inputs, sums, "q", row, head)
    return (query.astype(jnp.float32) * query.shape[1] ** -0.5).astype(query.dtype)


def _put(output, row: int, x: Float[Array, "n d"]) -> None:
    output[row] = x.astype(output.dtype).reshape(output.shape[1:])


def _logits(inputs, sums, row: int, head: int) -> Float[Array, "k q"]:
    logits = _product(_of_head(inputs, sums, "k", row, head), _query(inputs, sums, row, head), 1, 1)
    if "bias" in inputs:
        logits = logits + _bias(inputs, row, head)
    if "segments" in inputs:
        of_queries, of_keys = inputs["segments"]
        logits = jnp.where(_column(of_keys[row]) == of_queries[row], logits, MASKED)
    return logits


def _bias(inputs, row: int, head: int) -> Float[Array, "k q"]:
    """The bias between the row's places: products with one-hot matrices, which are exact."""
    if "places" not in inputs:
        return inputs["bias"][head, :, _block(inputs)].astype(jnp.float32)
    (of_queries, of_keys), bias = _one_hot(inputs, row), inputs["bias"][head]
    return _product(of_keys, _product(bias, of_queries, 1, 0).astype(bias.dtype), 1, 0)


def _one_hot(inputs, row: int) -> tuple[Float[Array, "p q"], Float[Array, "k p"]]:
    of_queries, of_keys = inputs["places"][0][row], _column(inputs["places"][1][row])
    _, for_keys, for_queries = inputs["bias"].shape
    of_queries = of_queries == jax.lax.broadcasted_iota(jnp.int32, (for_queries, of_queries.shape[1]), 0)
    of_keys = of_keys == jax.lax.broadcasted_iota(jnp.int32, (of_keys.shape[0], for_keys), 1)
    return of_queries.astype(inputs["bias"].dtype), of_keys.astype(inputs["bias"].dtype)


def _add_to_bias(inputs, row: int, head: int, logits: Float[Array, "k q"], output) -> None:
    """Adds the gradient of a row's logits to that of the bias."""
    if "places" not in inputs:
        block = _block(inputs)
        output[head, :, block] = output[head, :, block] + logits
        return
    of_queries, of_keys = _one_hot(inputs, row)
    by_key = _product(of_keys, logits.astype(of_keys.dtype), 0, 0)
    output[head] = output[head] + _product(by_key.astype(of_keys.dtype), of_queries, 1, 1)


def _block(inputs) -> slice | pl.Slice:
    """The program's queries among all of a row."""
    size = math.prod(inputs["q"].shape[1:-1])
    if inputs["bias"].shape[2] == size:
        return slice(None)
    return pl.ds(pl.multiple_of(pl.program_id(2) * size, LANES), size)


def _store(x: Float[Array, "k d"], output, row: int, sums) -> None:
    """Stores the gradient of a row's keys or values, summed over its blocks of queries."""
    if sums is None:
        _put(output, row, x)
        return
    sums[row] = jnp.where(pl.program_id(2) == 0, x, sums[row] + x)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        _put(output, row, sums[row])


def _transposed(heads: list[Float[Array, "d n"]]) -> Float[Array, "n heads*d"]:
    x = jnp.concatenate(heads, axis=0)
    return _filled(_filled(x, 0, LANES), 1, LANES).T[: x.shape[1], : x.shape[0]]  # in whole tiles


def _column(x: Int[Array, "1 n"]) -> Int[Array, "n 1"]:
    return _filled(jnp.broadcast_to(x, (LANES, x.shape[1])), 1, LANES).T[: x.shape[1], :1]


def _line(x: Float[Array, "n 1"]) -> Float[Array, "1 n"]:
    return _filled(jnp.broadcast_to(x, (x.shape[0], LANES)), 0, LANES).T[:1, : x.shape[0]]


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "m n"]:
    """Matrix product over these axes, summed in float32; of float32 in full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
