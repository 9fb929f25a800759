"""LayerNorm over each head's features for TPUs, which stay one axis: one pass through memory, and one back.

A TPU stores rows of 64 or 72 features as rows of 128, and XLA moves all features to make them. Here sums over a head,
and each head's value for its features, are products with a matrix of zeros and ones. The matrix unit multiplies numbers
of 8 bits, so others are split into several whose sum they are: 16 bits for bfloat16, 24 for float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from walt_jax.denoiser.kernels.tpu import LANES, VMEM_BYTES

EPSILON = 1e-6
ROWS = 256  # tokens of a program


def normalised(x: Float[Array, "*n d"], scale: Float[Array, " e"], interpret: bool = False) -> Float[Array, "*n d"]:
    """x standardised over each run of e features, times the scale; statistics are in float32.

    Args:
        x: features of all heads, head by head.
        scale: of a head's features.
        interpret: whether the kernel is interpreted rather than compiled.
    """
    features = scale.shape[0]
    row = jnp.tile(scale.astype(jnp.float32), x.shape[-1] // features)[None]
    return _norm((features, interpret), x.reshape(-1, x.shape[-1]), row).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(options, x, scale):
    return _call(_forward_kernel, options, [x, scale], [x])[0]


def _forward(options, x, scale):
    return _norm(options, x, scale), (x, scale)


def _backward(options, residuals, slope):
    return tuple(_call(_backward_kernel, options, [*residuals, slope], residuals))


_norm.defvjp(_forward, _backward)


def _call(kernel, options: tuple[int, bool], inputs: list[Array], outputs: list[Array]) -> list[Array]:
    """Runs a kernel over rows; what has one row is shared by all, and summed over them where it is an output."""
    features, interpret = options
    rows, width = inputs[0].shape
    block = min(ROWS, -(-rows // 16) * 16)

    def spec(x):
        return (
            pl.BlockSpec((1, width), lambda i: (0, 0))
            if len(x) == 1
            else pl.BlockSpec((block, width), lambda i: (i, 0))
        )

    return pl.pallas_call(
        functools.partial(kernel, rows, features),
        grid=(-(-rows // block),),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) if len(outputs) > 1 else ("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        # Not those of products with zeros and ones: they are none of the model's, and take less time than the bytes.
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))
        ),
        interpret=interpret,
        name=f"head_norm{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs)


def _forward_kernel(rows: int, features: int, x, scale, out):
    standard, _ = _standardised(x[...], features)
    out[...] = (standard * scale[...]).astype(out.dtype)


def _backward_kernel(rows: int, features: int, x, scale, slope, x_slope, scale_slope):
    block = x.shape[0]
    there = pl.program_id(0) * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < rows
    # The last block may end after the last row.
    slope = jnp.where(there, slope[...].astype(jnp.float32), 0)
    values = jnp.where(there, x[...], 0)
    standard, inverse = _standardised(values, features)
    pieces = _pieces(x.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        scale_slope[...] = jnp.zeros_like(scale_slope)

    scale_slope[...] += (slope * standard).sum(0, keepdims=True)
    slope = slope * scale[...]
    level = _sums(slope, features, pieces) / features
    along = _sums(slope * standard, features, pieces) / features
    # d x = (slope - its mean - standard · mean of their product) / deviation, each head by itself.
    width = x.shape[1]
    x_slope[...] = (
        _spread(inverse, features, width, pieces)
        * (slope - _spread(level, features, width, pieces) - standard * _spread(along, features, width, pieces))
    ).astype(x_slope.dtype)


def _standardised(x: Float[Array, "n d"], features: int) -> tuple[Float[Array, "n d"], Float[Array, "n lanes"]]:
    """x less each head's mean over its deviation, and the inverse of the latter."""
    wide, pieces = x.astype(jnp.float32), _pieces(x.dtype)
    mean = _sums(wide, features, pieces if x.dtype == jnp.float32 else 1) / features
    square = _sums(wide * wide, features, pieces) / features
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + EPSILON)
    level = _spread(mean * inverse, features, x.shape[1], pieces)
    return wide * _spread(inverse, features, x.shape[1], pieces) - level, inverse


def _pieces(dtype: jnp.dtype) -> int:
    return 3 if dtype == jnp.float32 else 2


def _sums(x: Float[Array, "n d"], features: int, pieces: int) -> Float[Array, "n lanes"]:
    """The sum over each head's features, heads in the first lanes."""
    return _product(x, _heads(features, x.shape[1], 0), pieces)


def _spread(x: Float[Array, "n lanes"], features: int, width: int, pieces: int) -> Float[Array, "n d"]:
    """Each head's value for all of its features."""
    return _product(x, _heads(features, width, 1), pieces)


def _heads(features: int, width: int, axis: int) -> Float[Array, "..."]:
    """1 where a feature, along `axis`, is one of a head, along the other; 0 elsewhere."""
    lanes = -(-(width // features) // LANES) * LANES
    shape = (width, lanes) if axis == 0 else (lanes, width)
    feature, head = (jax.lax.broadcasted_iota(jnp.int32, shape, a) for a in (axis, 1 - axis))
    first = head * features
    return ((feature >= first) & (feature < first + features)).astype(jnp.bfloat16)


def _product(x: Float[Array, "n k"], ones: Float[Array, "k m"], pieces: int) -> Float[Array, "n m"]:
    """x times a matrix of zeros and ones, x in so many pieces of 8 bits."""
    total = 0
    for _ in range(pieces):
        # Cut off rather than rounded: a compiler may leave a conversion there and back out.
        piece = jax.lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
        piece = jax.lax.bitcast_convert_type(piece, jnp.float32)
        total = total + jnp.dot(piece.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32)
        x = x - piece
    return total
