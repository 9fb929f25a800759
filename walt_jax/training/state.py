"""The state that a training step changes, and the step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from walt_jax.training.tasks import Task

# XLA's CPU compiler removes optimization barriers before it fuses operations, unless this pass is disabled.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


class TrainState(flax.struct.PyTreeNode):
    """Everything that a stage's steps change; a checkpoint holds all of it.

    Attributes:
        step: number of steps done.
        params: the current parameters.
        moving: what changes without a gradient: a codebook, averages of the discriminator's logits.
        ema: the exponential moving average of what the task serves, which is what is sampled from and evaluated. None
            where `ema_decay` is 0: the parameters themselves are served then, and no copy of them is kept.
        opt_state: the optimizer's.
    """

    step: Int[Array, ""]
    params: Any
    moving: Any
    ema: Any
    opt_state: Any

    @classmethod
    def create(
        cls, params: Any, moving: Any, task: Task, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        # A copy: the step donates its state, and a buffer can be donated once only.
        ema = jax.tree.map(jnp.copy, task.served(params, moving)) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), params, moving, ema, optimizer.init(params))

    def served(self, task: Task) -> Any:
        """What the trained model needs: the average, or the current parameters where none is kept."""
        return task.served(self.params, self.moving) if self.ema is None else self.ema


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, ema_decay: float, platform: str | None = None
) -> Callable[[TrainState, Any, Any, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Compiles `(state, frozen, batch, key) -> (state, metrics)`.

    The step's randomness is `fold_in(key, step)`: a resumed run draws what an uninterrupted one would have. `metrics`
    has `gradient_norm`, `parameter_norm` (after the update) and what the task adds, `loss` among it. The state's
    buffers are donated. `platform` is what the step is compiled for, where that isn't this machine's.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray):
        key = jax.random.fold_in(key, state.step)
        gradients, moving, metrics = task.gradients(state.params, state.moving, frozen, batch, key, state.step)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if ema_decay:
            # A smaller decay in early steps, so that the average forgets the initialisation.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            served = task.served(params, moving)
            ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, served)
        # The loss is that of the parameters before the update, their norm is that after it.
        norms = {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, moving, ema, opt_state), {**metrics, **norms}

    options = COMPILER_OPTIONS.get(platform or jax.default_backend())
    return jax.jit(train_step, donate_argnums=0, compiler_options=options)
