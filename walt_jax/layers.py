"""Shared by the tokenizer, the denoiser and the text encoder: a linear layer with named axes, and what CPUs need."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from walt_jax.parallel.rules import divided_along, gathered

Initializer = Callable[..., Array]
INT8_SCALE = "kernel_scale"  # the parameter that stands next to a kernel of 8 bits


def along_channels(values: Float[Array, " c"]) -> Float[Array, "1 1 1 1 c"]:
    """A value a channel, to be combined with clips."""
    return values[None, None, None, None]


_target = jax.make_user_context(default_value=None)  # part of the key of JAX's caches of traces


ANY_PLATFORM = "any"  # of a program that is traced once and compiled for several


def compiling_for(platform: str | None) -> contextlib.AbstractContextManager:
    """Within it, programs are traced for this platform: "cpu", "cuda", "tpu" or `ANY_PLATFORM`, whose programs have no
    kernels or workarounds of one platform; None is this machine's.

    To be used inside of the function that is traced, or around its tracing, where a program is compiled for hardware
    that is not there.
    """
    return _target(platform)


def platform() -> str:
    """What programs are traced for: "cpu", "gpu", "cuda", "tpu" or `ANY_PLATFORM`.

    Decided when a program is traced, by the devices of the mesh in context, if there is one, or JAX's default:
    `jax.lax.platform_dependent` would trace all ways, in a multiple of the time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return _target.value or (device.platform if device else jax.default_backend())


def on_cpu() -> bool:
    """Whether programs are traced for a CPU, some of whose compiler's weaknesses are worked around."""
    return platform() == "cpu"


def on_gpu() -> bool:
    """Whether programs are traced for GPUs."""
    return platform() in ("gpu", "cuda")


def flat(x: Float[Array, "*n d"], kept: int = 1) -> Float[Array, "..."]:
    """On CPUs x with all axes but the last `kept` as one; elsewhere, and where tokens are divided, x itself.

    XLA's CPU backend takes four times as long to sum over the last axis if the first axis has length 1, as that of one
    pack or one data shard has. No sharding can express two divided axes that are merged.
    """
    if not on_cpu() or divided_along("tokens"):
        return x
    return x.reshape(-1, *x.shape[x.ndim - kept :])


def product(x: Float[Array, "*n i"], kernel: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """x W over the last axis.

    On CPUs x is flattened to `[tokens, features]` first: for `[batch, tokens, features]` XLA's CPU backend copies the
    transposed cotangent to form the weight's gradient, which made a train step 2.5 times slower. Elsewhere, see `flat`.
    """
    return (flat(x) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def mixed_product(
    x: Float[Array, "*n i"], kernel: Float[Array, "i o"], axes: tuple[str, str], dtype: Any
) -> Float[Array, "*n o"]:
    """x W in `dtype`, narrower than the kernel's: the kernel's gradient is added up in the kernel's type.

    Without this, each device would round its sum over tokens to `dtype`, and devices would add up rounded sums.
    """
    return product(x, gathered(kernel, axes, dtype))


def _mixed_forward(x: Array, kernel: Array, axes: tuple[str, str], dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    # Not `mixed_product` itself: a remat policy that saves products would not see this one within it.
    return product(x, gathered(kernel, axes, dtype)), (x, kernel)


def _mixed_backward(
    axes: tuple[str, str], dtype: Any, saved: tuple[Array, Array], slope: Float[Array, "*n o"]
) -> tuple[Array, Array]:
    x, kernel = saved
    tokens = tuple(range(x.ndim - 1))
    own = jax.lax.dot_general(x, slope, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype)
    _, divide = jax.vjp(lambda kernel: gathered(kernel, axes, kernel.dtype), kernel)
    return product(slope, gathered(kernel, axes, dtype).T), divide(own)[0]


mixed_product.defvjp(_mixed_forward, _mixed_backward)


def stored(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """x, kept in memory on CPUs, where XLA would recompute the sum of all earlier residuals at each use.

    The gradient of a model of six layers takes a fifth less time; see `training.state.COMPILER_OPTIONS`. Elsewhere a
    barrier would only keep XLA from fusing operations.
    """
    return jax.lax.optimization_barrier(x) if on_cpu() else x


class Linear(nn.Module):
    """y = x W + b over the last axis.

    On CPUs the product is one of matrices, see `product`.

    Attributes:
        features: width of the output.
        axes: logical names of the kernel's input and output axes; sharding rules speak of these.
        use_bias: whether there is a b.
        kernel_init: of W, drawn in float32. LeCun normal by default.
        dtype: of the computation. Parameters are kept in float32, but for kernels of `generation.int8`.
    """

    features: int
    axes: tuple[str, str] = ("embed", "mlp")
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), (x.shape[-1], self.features)
        )
        if kernel.dtype == jnp.int8:  # see `generation.int8`
            scale = self.param(INT8_SCALE, nn.initializers.ones, (self.features,))
            y = product(x.astype(self.dtype), gathered(kernel, self.axes, self.dtype))
            y = (y.astype(scale.dtype) * jnp.expand_dims(scale, tuple(range(y.ndim - 1)))).astype(self.dtype)
        elif jnp.dtype(self.dtype) == kernel.dtype:
            y = product(x.astype(self.dtype), gathered(kernel, self.axes, self.dtype))
        else:
            y = mixed_product(x.astype(self.dtype), kernel, self.axes, self.dtype)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", bias_init, (self.features,))
            # In the bias's type, which its gradient is added up in.
            y = (y.astype(bias.dtype) + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))).astype(self.dtype)
        return y
