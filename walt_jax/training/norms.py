"""Norms of gradients and updates, by the modules at the top of a model."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def norms_by_module(name: str, tree: Any) -> dict[str, Float[Array, ""]]:
    """{"name/denoiser/cycle": …}: a norm for each module of each model; layers of one name count together.

    Args:
        name: of what `tree` holds.
        tree: structured as the parameters are: a model's name, then its modules' names.
    """
    squares: dict[str, Float[Array, ""]] = collections.defaultdict(lambda: jnp.zeros(()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        model, *module = (key.key for key in path[:2])
        squares["/".join([name, model, *(re.sub(r"_?\d.*", "", part) for part in module)])] += jnp.square(leaf).sum()
    return {group: jnp.sqrt(total) for group, total in squares.items()}
