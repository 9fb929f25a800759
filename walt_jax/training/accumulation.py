"""Gradient accumulation: a batch's gradients from its micro-batches one after the other, in the memory of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from walt_jax.diffusion.objective import Binned
from walt_jax.training.tasks import Metrics, Task


def accumulated_gradients(
    task: Task,
    count: int,
    params: Any,
    moving: Any,
    frozen: Any,
    batch: Any,
    key: PRNGKeyArray,
    step: Int[Array, ""],
) -> tuple[Any, Any, Metrics]:
    """As `task.gradients`, of `count` micro-batches in a scan; gradients are added up in float32.

    What is random is drawn for the whole batch and then split, and a micro-batch counts as many times as its loss has
    values (`Task.weight`). So for a loss that is a mean over clips or over values the result is the whole batch's, but
    for rounding. What is not such a mean is computed in each micro-batch and averaged: LeCam's regularisation and LFQ's
    entropy of the average code; "vq" restarts its codes within micro-batches. Of the metrics, PSNR and code statistics
    are then means over micro-batches too.

    Args:
        task: has the loss.
        count: of micro-batches; divides the batch, and its packs' shards.
        params, moving, frozen, batch, key, step: see `Task.gradients`.
    """
    if count == 1:
        return task.gradients(params, moving, frozen, batch, key, step)
    rows = shards_of(batch)
    parts = jax.tree.map(lambda leaf: micro_batches(leaf, rows, count), (batch, task.draw(batch, key)))

    def one(index: Int[Array, ""], part: Any) -> tuple[Float[Array, ""], Any]:
        """A micro-batch's weight, and its results times that; what is binned is a sum already."""
        own, draws = part
        gradients, moved, metrics = task.gradients(
            params, moving, frozen, own, jax.random.fold_in(key, index), step, draws
        )
        results = gradients, moved if task.moves else {}, metrics
        weight = task.weight(own, draws)
        return weight, _map(lambda leaf: weight * leaf, results)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*part)), None

    indices = jnp.arange(count)
    shapes = jax.eval_shape(one, indices[0], jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (weight, results), _ = jax.lax.scan(add, zeros, (indices, parts))
    gradients, moved, metrics = _map(lambda leaf: leaf / weight, results)
    return gradients, moved if task.moves else moving, metrics


def _map(change: Any, results: Any) -> Any:
    """Changes all but what is binned."""
    of_bins = lambda leaf: isinstance(leaf, Binned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if of_bins(leaf) else change(leaf), results, is_leaf=of_bins)


def shards_of(batch: Any) -> int:
    """How many parts a batch can be split into: its clips, or the shards that its packs are grouped in."""
    return len(batch["pack"].deferred) if "pack" in batch else len(jax.tree.leaves(batch)[0])


def micro_batches(leaf: Shaped[Array, "n *rest"], shards: int, count: int) -> Shaped[Array, "count m *rest"]:
    """Deals the shards of an array's rows to `count` micro-batches, each `count`-th to the same one.

    Shards of one device then stay with it, as long as their number is a multiple of `count`.
    """
    dealt = leaf.reshape(shards // count, count, len(leaf) // shards, *leaf.shape[1:])
    return dealt.swapaxes(0, 1).reshape(count, len(leaf) // count, *leaf.shape[1:])
