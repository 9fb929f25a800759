"""The compiled train steps of a stage: what each costs, and a warning when one is compiled again."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from walt_jax.parallel.cost import jaxpr_flops
from walt_jax.parallel.processes import ready
from walt_jax.training.state import OPTIMIZER

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX reports for each compilation


class StepPrograms:
    """A train step that knows its programs, one for each shape of batches.

    Args:
        train_step: see `make_train_step`.
        one_shape: whether all batches should have the same shapes, as packs do.

    Attributes:
        flops: matrix products and convolutions of the last step's program, forward and backward, without those that
            rematerialisation repeats and without the optimizer's: the "model FLOPs" of MFU. Of all devices together.
        compiled: whether the last call compiled a program.
    """

    def __init__(self, train_step: Callable[..., Any], one_shape: bool = False):
        self._step, self._one_shape = train_step, one_shape
        self._flops: dict[Any, int] = {}  # by structure, shapes and types of a batch
        self._seconds: list[float] = []  # of the compilations of the current call
        self._thread: int | None = None  # which is in a call; other threads compile programs of their own
        self.flops, self.compiled = 0, False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def __call__(self, state: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, str | None]:
        """The step's state and metrics, and a sentence if it should not have been compiled."""
        leaves, tree = jax.tree.flatten(batch)
        shapes = tree, *((leaf.shape, leaf.dtype) for leaf in leaves)
        new = shapes not in self._flops
        if new:
            # JAX keeps the trace for the call that follows.
            jaxpr = self._step.trace(state, frozen, batch, key).jaxpr
            self._flops[shapes] = jaxpr_flops(jaxpr.jaxpr, leave_out=("rematted_computation", OPTIMIZER))
        self.flops = self._flops[shapes]
        self._seconds, self._thread = [], threading.get_ident()
        try:
            if new:
                ready(self._step, state, frozen, batch, key)
            state, metrics = self._step(state, frozen, batch, key)
        finally:
            self._thread = None
        self.compiled = bool(self._seconds)
        warning = None
        if self.compiled and (not new or (self._one_shape and len(self._flops) > 1)):
            which = "new shapes" if new else "shapes that it had been compiled for before"
            took = f"which took {sum(self._seconds):.1f} s, for {which}, {named_shapes(batch)}"
            warning = f"the train step was compiled again, {took}."
        return state, metrics, warning

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED and threading.get_ident() == self._thread:
            self._seconds.append(seconds)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


def named_shapes(batch: Any) -> str:
    """Names, types and shapes of a batch's arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
    )
