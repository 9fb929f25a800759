"""Weights of linear layers in 8 bits for sampling: an integer each, and a float32 step for each output channel."""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int8

from walt_jax.generation.lora import layers
from walt_jax.layers import INT8_SCALE

LARGEST = 127


def quantised(params: Any) -> Any:
    """Parameters whose linear layers have kernels of 8 bits; all others are as they were.

    A weight is its integer times the step of its output channel, which `layers.Linear` multiplies the product by; the
    error of each is at most half a step.
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    for path, kernel in layers(params).items():
        flat[*path, "kernel"], flat[*path, INT8_SCALE] = in_8_bits(kernel)
    return unflatten_dict(flat)


def in_8_bits(kernel: Float[Array, "*l i o"]) -> tuple[Int8[Array, "*l i o"], Float[Array, "*l o"]]:
    """(integers in -127..127, the step of each output channel): the channel's largest weight is 127 steps."""
    wide = kernel.astype(jnp.float32)
    step = jnp.abs(wide).max(-2) / LARGEST
    step = jnp.where(step > 0, step, 1.0)
    return jnp.round(wide / jnp.expand_dims(step, -2)).astype(jnp.int8), step


def is_quantised(params: Any) -> bool:
    """Whether some layer has a kernel of 8 bits."""
    return any(kernel.dtype == jnp.int8 for kernel in layers(params).values())
