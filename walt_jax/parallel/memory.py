"""How much memory there is, to refuse at once what can't fit."""

import math
import os
from typing import Any

import jax


def memory_bytes() -> int | None:
    """Bytes of the first device's memory, or of the machine's where that is a CPU; None if unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats()
        return None if not stats else stats.get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes, on all devices together; copies count once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of their shapes with shardings, takes in each device's own memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not str(leaf.sharding.memory_kind).endswith("host")
    )
