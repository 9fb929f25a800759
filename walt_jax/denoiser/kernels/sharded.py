"""Fused attention on a mesh: each device computes its rows and heads; kernels are not partitioned automatically."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from walt_jax.denoiser.kernels import tpu
from walt_jax.errors import UserError
from walt_jax.parallel.mesh import BATCH_AXES

HEADS = "tensor"  # the axis of the mesh that divides heads


def sharded(
    query: Float[Array, "b q heads d"],
    key: Float[Array, "b k heads d"],
    value: Float[Array, "b k heads d"],
    bias: Float[Array, "heads p p"] | None,
    places: tpu.Pair | None,
    segments: tpu.Pair | None,
    interpret: bool = False,
) -> tuple[Float[Array, "b q heads d"], Float[Array, "b q heads"]]:
    """`tpu.fused` on the mesh of the context, along those of its axes that no enclosing `jax.shard_map` divides.

    Integers of queries may have one row, or one for all. An enclosing `jax.shard_map` needs `check_vma=False`: a
    kernel's results do not say along which axes they vary.

    Raises:
        UserError: if an axis of the mesh does not divide rows or heads.
    """

    def whole(pair):
        return None if pair is None else (jnp.broadcast_to(pair[0], query.shape[:2]), pair[1])

    arguments = query, key, value, bias, whole(places), whole(segments)
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: mesh.shape[name] for name in mesh.auto_axes}
    if not free or mesh.size == 1:  # axes of one device are divided along too: no axis may be left to the compiler
        return tpu.fused(*arguments, interpret=interpret)
    rows, heads = tuple(name for name in BATCH_AXES if name in free), HEADS if HEADS in free else None
    for size, what, axes in ((query.shape[0], "rows", rows), (query.shape[2], "heads", (heads,) if heads else ())):
        parts = math.prod(free[name] for name in axes)
        if size % parts:
            raise UserError(
                f"attention has {size} {what}, which the mesh's {' × '.join(axes)} = {parts} do not divide: "
                f"choose a mesh whose axes do"
            )
    tokens, of_bias, integers = PartitionSpec(rows, None, heads), PartitionSpec(heads), PartitionSpec(rows)
    return jax.shard_map(
        lambda *arguments: tpu.fused(*arguments, interpret=interpret),
        in_specs=(tokens, tokens, tokens, of_bias, integers, integers),
        out_specs=(tokens, tokens),
        axis_names=set(free),
        check_vma=False,
    )(*arguments)
