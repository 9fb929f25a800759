"""The kernel on a mesh of eight devices, interpreted; prints what `test_fused` looks at."""

import functools
import json

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import normal

from walt_jax.denoiser.kernels import tpu
from walt_jax.denoiser.kernels.head_norm import normalised
from walt_jax.denoiser.kernels.sharded import sharded, sharded_norm, sharded_windows
from walt_jax.errors import UserError
from walt_jax.layers import compiling_for

ROWS, TOKENS, HEADS, FEATURES = 4, 16, 2, 8
AXES = "data", "fsdp", "tensor", "context"


def with_gradients(function):
    """A compiled function of (query, key, value, bias) that has the gradients too."""

    def weighed(*arguments):
        segments = np.array([[0, 1] * (TOKENS // 2)] * len(arguments[0]))
        out, logsum = function(*arguments, None, (segments[:1], segments), interpret=True)
        return (out * normal(8, *out.shape)).sum() + (logsum * normal(9, *logsum.shape)).sum(), (out, logsum)

    return jax.jit(jax.grad(weighed, (0, 1, 2, 3), has_aux=True))


def alone(query, key, value, bias, places, segments, interpret):
    segments = np.broadcast_to(segments[0], segments[1].shape), segments[1]
    return tpu.fused(query, key, value, bias, places, segments, interpret)


def within(*arguments, interpret):
    """`sharded` where the rows' axes are those of a `shard_map` already, as for packs."""
    *tokens, bias, _, segments = arguments
    rows = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(
        lambda *x: sharded(*x[:4], None, x[4:], interpret),
        in_specs=(rows, rows, rows, PartitionSpec(), PartitionSpec(), rows),
        out_specs=(rows, rows),
        axis_names={"data", "fsdp"},
        check_vma=False,
    )(*tokens, bias, *segments)


def windows(query, key, value, bias, places, segments, interpret, function=sharded_windows):
    """Two windows a row, each with a part of each of two frames."""
    parts = [x.reshape(len(x), 2, 2, TOKENS // 4, *x.shape[2:]) for x in (query, key, value)]
    out, logsum = function(*parts, bias[:, : TOKENS // 2, : TOKENS // 2], interpret)
    return out.reshape(query.shape), logsum.reshape(query.shape[:3])


def norm(query, key, value, bias, places, segments, interpret, function=sharded_norm):
    """Queries over each head; the scale has a gradient too."""
    y = function(query.reshape(*query.shape[:2], -1), bias[0, 0, :FEATURES], interpret)
    return y.reshape(query.shape), key[..., 0]


def message(*shape):
    try:
        jax.eval_shape(lambda x: sharded(x, x, x, None, None, None), jax.ShapeDtypeStruct(shape, np.float32))
    except UserError as error:
        return str(error)


def difference(one, other):
    return max(float(abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def main():
    mesh = jax.make_mesh((2, 2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    arguments = [normal(i, ROWS, TOKENS, HEADS, FEATURES) for i in range(3)] + [normal(3, HEADS, TOKENS, TOKENS)]
    expected = jax.device_get(with_gradients(alone)(*arguments))
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))) for x in arguments[:3]]
    with jax.set_mesh(mesh):
        found = jax.device_get([with_gradients(function)(*placed, arguments[3]) for function in (sharded, within)])
        with compiling_for("cuda"):
            found.append(jax.device_get(with_gradients(sharded)(*placed, arguments[3])))
        three = jax.device_get(with_gradients(sharded)(*(x[:3] for x in arguments[:3]), arguments[3]))
        heads = message(ROWS, TOKENS, 3, FEATURES)
    one, other, of_gpus = (difference(each, expected) for each in found)
    apart = {}
    for name, function, alone_too in (
        ("windows", windows, functools.partial(windows, function=tpu.fused_windows)),
        ("norm", norm, functools.partial(norm, function=normalised)),
    ):
        with jax.set_mesh(mesh):
            ours = jax.device_get(with_gradients(function)(*placed, arguments[3]))
        apart[name] = difference(ours, jax.device_get(with_gradients(alone_too)(*arguments)))
    undivided = difference(three, jax.device_get(with_gradients(alone)(*(x[:3] for x in arguments[:3]), arguments[3])))
    print(
        json.dumps(
            {"difference": one, "within": other, "gpu": of_gpus, "undivided": undivided, "heads": heads, **apart}
        )
    )


main()
