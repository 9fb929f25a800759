"""Where and how precisely an optimizer's state is kept between steps: in bfloat16, or in the host's memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, PRNGKeyArray

from walt_jax.errors import UserError

HOST = "pinned_host"


class Rounded(NamedTuple):
    """State in bfloat16, and how many updates there were."""

    count: Int[Array, ""]
    inner: Any


class OnHost(NamedTuple):
    """State in the host's memory."""

    inner: Any


def stochastically_rounded(x: Float32[Array, "*n"], key: PRNGKeyArray) -> BFloat16[Array, "*n"]:
    """Up or down to a bfloat16, with probabilities that give x on average."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its float32 arrays kept in bfloat16, in half the memory; it computes in float32.

    They are rounded stochastically. Rounded to the nearest, a second moment with β₂ = 0.999 would never fall: a step
    takes at most a thousandth from it, and neighbours in bfloat16 differ by a 256th.
    """

    def init(params: Any) -> Rounded:
        state = optimizer.init(params)
        return Rounded(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if _is_wide(leaf) else leaf, state),
        )

    def update(gradients: Any, state: Rounded, params: Any = None) -> tuple[Any, Rounded]:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, state.inner)
        updates, after = optimizer.update(gradients, wide, params)
        leaves, tree = jax.tree.flatten(after)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        narrow = [
            stochastically_rounded(leaf, jax.random.fold_in(key, number)) if _is_wide(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        return updates, Rounded(state.count + 1, tree.unflatten(narrow))

    return optax.GradientTransformation(init, update)


def _is_wide(leaf: Array) -> bool:
    return leaf.ndim > 0 and leaf.dtype == jnp.float32


def on_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its arrays in the host's memory between steps: each update copies them there and back.

    The update is taken in the device's memory. What is kept is marked `OnHost`, which `host_shardings` reads.

    Raises:
        UserError: if the platform has no such memory.
    """
    device = jax.devices()[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"optimizer.offload keeps the optimizer's state in memory of the kind {HOST}, which {device.device_kind} "
            "does not have; leave it out, or use state_dtype='bfloat16'."
        )

    def update(gradients: Any, state: OnHost, params: Any = None) -> tuple[Any, OnHost]:
        here = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), state.inner)
        updates, after = optimizer.update(gradients, here, params)
        return updates, OnHost(after)

    return optax.GradientTransformation(lambda params: OnHost(optimizer.init(params)), update)


def host_shardings(shardings: Any, state: Any) -> Any:
    """Shardings of an optimizer's state with the memory that `on_host` asks for; numbers of steps stay on the device.

    Args:
        shardings: structured as
        state: the state, shapes suffice.
    """

    def moved(node: Any, shapes: Any) -> Any:
        if not isinstance(node, OnHost):
            return node
        return jax.tree.map(lambda place, leaf: place.with_memory_kind(HOST) if leaf.ndim else place, node, shapes)

    return jax.tree.map(moved, shardings, state, is_leaf=lambda node: isinstance(node, OnHost))
