"""LoRA (Hu et al. 2021): low-rank changes of a trained model's layers, as a function of parameter trees.

Modules know nothing of it: they get merged weights, W + α/r · B A, in training as in sampling.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from walt_jax.config import Positive
from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import unboxed

Path = tuple[str, ...]
A, B = "lora_a", "lora_b"
SCANNED = "cycles"  # the module whose parameters are stacked along a first axis, see `denoiser.model`


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What LoRA trains.

    Attributes:
        rank: r, of each layer's change.
        alpha: α; the change is α/r · B A. PEFT's defaults are 8 and 8.
        targets: names of modules, or of consecutive ones joined by ".", such as "cross_attention.key": all linear
            layers in them are changed. "text" is the text encoder that was trained with the denoiser.
    """

    rank: Positive = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("self_attention", "cross_attention", "mlp_in", "mlp_out", "text")

    @property
    def scale(self) -> float:
        """α/r"""
        return self.alpha / self.rank


def layers(params: Any) -> dict[Path, Any]:
    """The linear layers of parameters, by their paths: kernels [in, out], in a scanned module [layers, in, out]."""
    return {
        path[:-1]: leaf
        for path, leaf in flatten_dict(params).items()
        if path[-1] == "kernel" and leaf.ndim == (3 if SCANNED in path else 2)
    }


def targeted(params: Any, targets: tuple[str, ...]) -> dict[Path, Any]:
    """Those of `layers` that are in a module of the targets.

    Raises:
        UserError: if there are none in one of the targets.
    """
    found = layers(params)
    names = {path: f".{'.'.join(path)}." for path in found}
    for target in targets:
        if not any(f".{target}." in name for name in names.values()):
            some = ", ".join(sorted({part for path in found for part in path[-2:]}))
            raise UserError(
                f"lora.targets has {target!r}, and the model has no layer in such a module; name some of {some}."
            )
    return {path: leaf for path, leaf in found.items() if any(f".{target}." in names[path] for target in targets)}


def fresh(boxed: Any, config: LoraConfig, key: PRNGKeyArray) -> Any:
    """A and B as PEFT begins with them: A uniform in ±1/√in, B zero, so that nothing changes.

    Args:
        boxed: the model's parameters or their shapes, with their logical axis names, `nn.Partitioned`.
        config: see `LoraConfig`.
        key: of A.

    Returns:
        Nested as the parameters are: of each layer `lora_a` [in, r] and `lora_b` [r, out], with logical axis names.

    Raises:
        UserError: as `targeted`.
    """
    flat, made = flatten_dict(boxed), {}
    for number, (path, kernel) in enumerate(sorted(targeted(unboxed(boxed), config.targets).items())):
        *stack, wide, high = kernel.shape
        *first, axis_in, axis_out = flat[*path, "kernel"].names
        own, bound = jax.random.fold_in(key, number), wide**-0.5
        a = jax.random.uniform(own, (*stack, wide, config.rank), minval=-bound, maxval=bound)
        b = jnp.zeros((*stack, config.rank, high), jnp.float32)
        made[*path, A] = nn.LogicallyPartitioned(a, (*first, axis_in, "rank"))
        made[*path, B] = nn.LogicallyPartitioned(b, (*first, "rank", axis_out))
    return unflatten_dict(made)


def merged(params: Any, pairs: Any, scale: float | Array) -> Any:
    """Parameters with a LoRA's change added: W + scale · A B, computed in float32.

    Args:
        params: of the model.
        pairs: structured as `fresh` returns them, without axis names.
        scale: α/r, times the weight that the LoRA has.
    """
    flat, changes = flatten_dict(params, keep_empty_nodes=True), flatten_dict(pairs)
    for (*path, name), a in changes.items():
        if name == A:
            kernel, place = flat[*path, "kernel"], (*path, "kernel")
            change = jnp.matmul(a, changes[*path, B], precision=jax.lax.Precision.HIGHEST)
            flat[place] = (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
    return unflatten_dict(flat)
