"""Fused attention on a mesh: each device computes its rows and heads; kernels are not partitioned automatically."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from walt_jax.denoiser.kernels import Pair, gpu, head_norm, tpu
from walt_jax.errors import UserError
from walt_jax.layers import on_gpu, platform
from walt_jax.parallel.rules import divided_along

HEADS = "tensor"  # the axis of the mesh that divides heads


def holds(heads: int, features: int, places: int, dtype: jnp.dtype) -> bool:
    """Whether the platform has a kernel for these heads and a bias between so many places, 0 if there is none."""
    if on_gpu():
        return gpu.holds(features, places)
    return platform() == "tpu" and tpu.holds(heads, features, places, dtype)


def sharded(
    query: Float[Array, "b q heads d"],
    key: Float[Array, "b k heads d"],
    value: Float[Array, "b k heads d"],
    bias: Float[Array, "heads p p"] | None,
    places: Pair | None,
    segments: Pair | None,
    interpret: bool = False,
) -> tuple[Float[Array, "b q heads d"], Float[Array, "b q heads"]]:
    """The platform's kernel on the mesh in context, along its axes that no enclosing `jax.shard_map` divides.

    Integers of queries may have one row, or one for all. An enclosing `jax.shard_map` needs `check_vma=False`: a
    kernel's results do not say along which axes they vary.

    An axis that does not divide the rows computes all of them on each of its devices.

    Raises:
        UserError: if `tensor` does not divide the heads.
    """

    def whole(pair):
        return None if pair is None else (jnp.broadcast_to(pair[0], query.shape[:2]), pair[1])

    fused = gpu.fused if on_gpu() else tpu.fused
    return _on_mesh(
        functools.partial(fused, interpret=interpret), query, key, value, bias, whole(places), whole(segments)
    )


def sharded_windows(
    query: Float[Array, "b t w n heads d"],
    key: Float[Array, "b t w n heads d"],
    value: Float[Array, "b t w n heads d"],
    bias: Float[Array, "heads tn tn"] | None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t w n heads d"], Float[Array, "b t w n heads"]]:
    """`tpu.fused_windows` on the mesh in context, as `sharded`.

    Raises:
        UserError: if `tensor` does not divide the heads.
    """
    return _on_mesh(functools.partial(tpu.fused_windows, interpret=interpret), query, key, value, bias)


def sharded_norm(
    x: Float[Array, "b *n d"], scale: Float[Array, " e"], interpret: bool = False
) -> Float[Array, "b *n d"]:
    """`head_norm.normalised` on the mesh in context, which divides rows, tokens (of `[b, n, d]`) and whole heads."""
    run = functools.partial(head_norm.normalised, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: mesh.shape[name] for name in mesh.auto_axes}
    if not free or mesh.size == 1:
        return run(x, scale)
    rows, heads = tuple(divided_along("batch", x.shape[0])) or None, HEADS if HEADS in free else None
    tokens = tuple(divided_along("tokens", x.shape[1])) or None if x.ndim == 3 else None
    spec = PartitionSpec(rows, tokens, *[None] * (x.ndim - 3), heads)
    return jax.shard_map(run, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names=set(free), check_vma=False)(
        x, scale
    )


def _on_mesh(fused: Callable[..., Any], query: Array, key: Array, value: Array, bias: Array | None, *pairs: Any) -> Any:
    """`fused` of each device's rows and heads; these are the second axis from the last."""
    arguments = query, key, value, bias, *pairs
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: mesh.shape[name] for name in mesh.auto_axes}
    if not free or mesh.size == 1:  # axes of one device are divided along too: no axis may be left to the compiler
        return fused(*arguments)
    rows, heads = tuple(divided_along("batch", query.shape[0])) or None, HEADS if HEADS in free else None
    if heads and query.shape[-2] % free[heads]:
        raise UserError(
            f"attention has {query.shape[-2]} heads, which the mesh's {heads} = {free[heads]} does not divide: choose "
            "a mesh whose axis does"
        )
    tokens = PartitionSpec(rows, *[None] * (query.ndim - 3), heads)
    return jax.shard_map(
        fused,
        in_specs=(tokens, tokens, tokens, PartitionSpec(heads), *[PartitionSpec(rows)] * len(pairs)),
        out_specs=(tokens, tokens),
        axis_names=set(free),
        check_vma=False,
    )(*arguments)
