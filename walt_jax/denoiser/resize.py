"""Position tables for clips or windows of another size: linear interpolation, as W.A.L.T's 9:16 fine-tuning has it."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float


def resize(params: Any, like: Any) -> Any:
    """A denoiser's parameters, for other bounds and windows.

    Tables of positions have an axis for time, height and width each, those of relative positions one for each axis of
    the offset; they are the only parameters whose shape depends on the size of clips and windows. Where an axis is
    unchanged, so are the values.

    Args:
        params: of the stage before.
        like: parameters of the same structure, or their shapes, for the new size.

    Raises:
        ValueError: if the structures differ, or the number of axes of a parameter.
    """
    return jax.tree.map(lambda leaf, target: interpolate(leaf, target.shape), params, like)


def interpolate(table: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Linear interpolation along each axis whose length differs; first and last values stay first and last.

    So an offset of 0, which is in the middle of an axis of offsets, stays there. An axis of one value is repeated.

    Raises:
        ValueError: if the number of axes differs.
    """
    if len(shape) != table.ndim:
        raise ValueError(f"a parameter of shape {table.shape} can't be interpolated to {shape}")
    for axis, (before, after) in enumerate(zip(table.shape, shape, strict=True)):
        if before != after:
            places = np.linspace(0, before - 1, after) if after > 1 else np.array([(before - 1) / 2])
            first = np.minimum(places.astype(int), max(before - 2, 0))
            second = np.minimum(first + 1, before - 1)
            share = np.expand_dims(places - first, [a for a in range(table.ndim) if a != axis]).astype(table.dtype)
            below, above = table.take(first, axis), table.take(second, axis)
            table = below + share * (above - below)  # exact where both are equal
    return table
