"""Muon (Jordan et al. 2024): the momentum of each matrix, orthogonalised by five Newton-Schulz iterations.

It does what `optax.contrib.muon` does, in a third to a half of the time on a CPU, where a product of matrices along an
axis of length 1 is one that XLA transposes its arguments for, and with fewer products where a matrix isn't square.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# a, b, c of an iteration x ← (a + b x xᵀ + c (x xᵀ)²) x, which takes singular values from all of (0, 1] to about 1.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95
EPSILON = 1e-8


def orthogonalised(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """A matrix with the singular vectors of x, and singular values of 0.7 to 1.2 where x's are not next to 0.

    All iterations' polynomials of x xᵀ are multiplied first, which are small matrices where x is long: x itself has two
    products, not ten.
    """
    tall = x.shape[0] > x.shape[1]
    x = x / (jnp.linalg.norm(x) + EPSILON)
    square = x.T @ x if tall else x @ x.T
    a, b, c = COEFFICIENTS
    identity, total = jnp.eye(len(square), dtype=x.dtype), None
    for number in range(ITERATIONS):
        factor = a * identity + b * square + c * (square @ square)
        total = factor if total is None else factor @ total
        if number < ITERATIONS - 1:
            square = factor @ square @ factor
    return x @ total if tall else total @ x


class MuonState(NamedTuple):
    """Steps done, and the moving average of gradients."""

    count: Array
    momentum: Any


def scale_by_muon(stacked: bool = False) -> optax.GradientTransformation:
    """Nesterov's momentum of each array as a matrix, orthogonalised, and larger where it has more outputs than inputs.

    A matrix's columns are an array's last axis, its rows all others.

    Args:
        stacked: whether the arrays' first axis counts matrices.
    """

    def direction(ahead: Array) -> Array:
        first = 1 if stacked else 0
        size = math.prod(ahead.shape[first:-1]), ahead.shape[-1]
        function = jax.vmap(orthogonalised) if stacked else orthogonalised
        found = function(ahead.reshape(*ahead.shape[:first], *size)).reshape(ahead.shape)
        return math.sqrt(max(1.0, size[1] / size[0])) * found

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(updates, state.momentum, MOMENTUM, 1)
        ahead = jax.tree.map(
            lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g,
            optax.tree.bias_correction(momentum, MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, MOMENTUM, count),
        )
        return jax.tree.map(direction, ahead), MuonState(count, momentum)

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)
