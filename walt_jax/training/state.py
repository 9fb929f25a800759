"""What a step changes, and the step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

# XLA's CPU compiler drops optimization barriers before it fuses operations, unless it is told to leave that pass out.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


class TrainState(flax.struct.PyTreeNode):
    """Everything about a stage that changes with its steps, and so everything that a checkpoint holds of it.

    Attributes:
        step: steps done.
        params: as the optimizer left them.
        ema: their exponential moving average, which is what is sampled from and evaluated.
        opt_state: the optimizer's.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        # A copy: the step donates its state, and a buffer can be donated once only.
        return cls(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


# (params, what is frozen, batch, key) -> (loss, other scalars to log)
LossFunction = Callable[[Any, Any, Any, PRNGKeyArray], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def make_train_step(loss_function: LossFunction, optimizer: optax.GradientTransformation, ema_decay: float):
    """Compiles `(state, frozen, batch, key) -> (state, metrics)`.

    The step's randomness is `fold_in(key, step)`: a resumed run draws what an uninterrupted one would have. `metrics`
    has `loss`, `gradient_norm`, `parameter_norm` (after the update) and what the loss function adds. The state's
    buffers are donated.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray):
        key = jax.random.fold_in(key, state.step)
        gradient = jax.value_and_grad(loss_function, has_aux=True)
        (loss, metrics), gradients = gradient(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows closely, or it would remember the initialisation for as long as it lasts.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        # The loss is that of the parameters before the update; the norm is of those that a checkpoint would keep.
        norms = {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
        metrics = {"loss": loss, **norms, **metrics}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    options = COMPILER_OPTIONS.get(jax.default_backend())
    return jax.jit(train_step, donate_argnums=0, compiler_options=options)
