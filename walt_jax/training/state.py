"""The state that a training step changes, and the step."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.layers import compiling_for
from walt_jax.parallel.mesh import replicated
from walt_jax.parallel.rules import Rules, like_parameters, shardings
from walt_jax.training.accumulation import accumulated_gradients
from walt_jax.training.moments import host_shardings
from walt_jax.training.norms import norms_by_module
from walt_jax.training.tasks import Metrics, Task

# XLA's CPU compiler removes optimization barriers before it fuses operations, unless this pass is disabled.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}
# SparseCores of TPUs gather parameters and add up gradients while the matrix units go on; without these the program
# waits for both.
SPARSE_CORES = dict.fromkeys(
    (
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "xla_tpu_use_tc_device_shape_on_sc",
    ),
    True,
) | {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": False}
SPARSE_CORE_KINDS = ("TPU v6 lite", "TPU v6e")  # of those that have them, what was compiled for
# What runs once is compiled without the slower passes: of random parameters they take twenty times as long as the rest.
ONCE_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}}


OPTIMIZER = "optimizer"  # the scope of its operations in a trace


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


def abstract_state(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules, ema_decay: float
) -> TrainState:
    """Shapes and types of a stage's state, and how each array is divided over the mesh.

    Moments, the average and a distillation's teacher are divided as their parameters are; what else has no gradient,
    such as a codebook, is on all devices.

    Args:
        task, optimizer, ema_decay: the stage's.
        mesh: see `parallel.mesh`; of devices that need not be there.
        rules: rows that precede `parallel.rules.DEFAULT_RULES`.

    Raises:
        UserError: if an axis of a parameter can't be divided.
    """
    boxed, moving = jax.eval_shape(task.init, jax.random.key(0))
    params, moving = unboxed(boxed), unboxed(moving)
    create = functools.partial(TrainState.create, task=task, optimizer=optimizer, ema_decay=ema_decay)
    shapes = jax.eval_shape(create, params, moving)
    divided, whole = shardings(boxed, mesh, rules), replicated(mesh)
    stays = like_parameters(moving, params, divided, mesh)
    ema = task.served(divided, stays) if ema_decay else None
    kept = host_shardings(like_parameters(shapes.opt_state, params, divided, mesh), shapes.opt_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        TrainState(whole, divided, stays, ema, kept),
    )


def state_shardings(state: TrainState) -> TrainState:
    """The shardings of a state, or of `abstract_state`'s shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    platform: str | None = None,
    divided: TrainState | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, Any, Any, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """Compiles `(state, frozen, batch, key) -> (state, metrics)`.

    The step's randomness is `fold_in(key, step)`: a resumed run draws what an uninterrupted one would have. `metrics`
    has `gradient_norm` and `parameter_norm` (after the update), gradient and update norms by module, and what the task
    adds, `loss` among it. The state's buffers are donated. `platform` is what the step is compiled for, where that
    isn't this machine's. `divided` is what `state_shardings` returns: the new state is divided as the old one; without,
    the compiler decides. `accumulate` is the number of micro-batches, see `accumulation`.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray):
        with compiling_for(platform):
            return update(state, frozen, batch, key)

    def update(state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray):
        key = jax.random.fold_in(key, state.step)
        gradients, moving, metrics = accumulated_gradients(
            task, accumulate, state.params, state.moving, frozen, batch, key, state.step
        )
        with jax.named_scope(OPTIMIZER):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema = None
        if ema_decay:
            # A smaller decay in early steps, so that the average forgets the initialisation.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            served = task.served(params, moving)
            ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, served)
        # The loss is that of the parameters before the update, their norm is that after it.
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
        metrics |= norms_by_module("gradient_norm", gradients) | norms_by_module("update_norm", updates)
        return TrainState(state.step + 1, params, moving, ema, opt_state), metrics

    options = COMPILER_OPTIONS.get(platform or jax.default_backend())
    if divided is not None and divided.step.mesh.devices.flat[0].device_kind in SPARSE_CORE_KINDS:
        options = SPARSE_CORES
    out = None if divided is None else (divided, replicated(divided.step.mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=options)
