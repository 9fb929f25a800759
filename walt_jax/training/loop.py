"""A stage's loop: restore, step, log, save."""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp

from walt_jax.config import Fraction, Positive
from walt_jax.errors import UserError
from walt_jax.generation.text_to_video import unboxed
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.latent_cache import latents_path
from walt_jax.training.metrics import MetricsLog
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.progress import Progress
from walt_jax.training.state import TrainState, make_train_step
from walt_jax.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run.

    Attributes:
        task: "tokenizer" or "denoiser".
        steps: optimizer steps.
        batch_size: clips a step.
        optimizer: see `OptimizerConfig`.
        frames: of a clip, instead of the data's; 1 trains on images.
        ema_decay: of the parameters' moving average.
        cached_clips: for a denoiser: this many clips are encoded once, and trained on again and again; 0 encodes each
            batch anew.
        log_every: steps between lines of `metrics.jsonl`.
        checkpoint_every: steps between checkpoints; there is one at the end in any case.
    """

    task: Literal["tokenizer", "denoiser"]
    steps: Positive
    batch_size: Positive
    optimizer: OptimizerConfig
    frames: Positive | None = None
    ema_decay: Fraction = 0.999
    cached_clips: int = 0
    log_every: Positive = 10
    checkpoint_every: Positive = 500

    def __post_init__(self):
        if self.task == "tokenizer" and self.cached_clips:
            raise ValueError("cached_clips is for denoiser stages")


def run_stage(
    name: str,
    stage: StageConfig,
    task: Task,
    dataset: Callable[[], grain.IterDataset],
    workdir: pathlib.Path,
    key: jax.Array,
    *,
    initial: Any = None,
    frozen: Any = None,
    finish: Callable[[TrainState], dict] = lambda state: {},
    later_stages: tuple[str, ...] = (),
) -> tuple[Any, dict]:
    """Trains a stage to its end, from where it was stopped if it was.

    Args:
        name: of the stage, and of its folder in `workdir/checkpoints`.
        stage: see `StageConfig`.
        task: parameters and loss.
        dataset: makes the batches; not called where the stage is done already.
        workdir: the run's folder.
        key: of the initialisation and, folded with the step, of all of the stage's randomness.
        initial: parameters to start from instead of the task's.
        frozen: passed to the loss.
        finish: measures something (JSON) on the last state, to be kept in its checkpoint.
        later_stages: names of those that start from this one; where it takes a step, what they left is removed.

    Returns:
        The parameters' moving average and what `finish` returned.

    Raises:
        UserError: if a loss is not finite; the last good checkpoint is kept.
    """
    key_init, key_steps = jax.random.split(key)
    optimizer = make_optimizer(stage.optimizer, stage.steps, jax.eval_shape(task.init, key_init))
    checkpoints = Checkpoints(workdir / "checkpoints" / name)

    def fresh() -> TrainState:
        return TrainState.create(unboxed(task.init(key_init)), optimizer)

    if checkpoints.latest_step() is not None:
        state, position, outcome = checkpoints.restore(jax.eval_shape(fresh))
    else:
        state, position, outcome = jax.jit(fresh)(), None, {}
        if initial is not None:
            state = TrainState.create(jax.tree.map(jnp.copy, initial), optimizer)
    start = int(state.step)
    if start >= stage.steps:
        checkpoints.close()
        return state.ema, outcome

    # What was made from this stage's earlier end is void: it will be made again.
    for later in later_stages:
        shutil.rmtree(workdir / "checkpoints" / later, ignore_errors=True)
        latents_path(workdir, later).unlink(missing_ok=True)
    log = MetricsLog(workdir, name, start, later_stages)
    iterator = iter(dataset())
    if position is not None:
        iterator.set_state(position)
    train_step = make_train_step(task.loss, optimizer, stage.ema_decay)
    progress = Progress(name, start, stage.steps)
    pending = None  # the last step's metrics: fetched one step late, so that the device never waits for the host
    began = clock = time.perf_counter()

    def report(step: int, metrics: Any) -> None:
        nonlocal clock
        values = finite(jax.device_get(metrics), name, step)
        now = time.perf_counter()
        progress.update(values["loss"])
        if step % stage.log_every == 0 or step == stage.steps:
            rate = {"clips_per_second": stage.batch_size / (now - clock), "elapsed_seconds": now - began}
            log.write(step, {**values, **rate})
        clock = now

    try:
        for step in range(start + 1, stage.steps + 1):
            batch = next(iterator)
            state, metrics = train_step(state, frozen, batch, key_steps)
            if pending:
                report(*pending)
            pending = step, metrics
            last = step == stage.steps
            if last or step % stage.checkpoint_every == 0:
                report(*pending)  # first: a state that is not finite must not be kept
                pending = None
                outcome = finish(state) if last else {}
                checkpoints.save(state, iterator.get_state(), outcome)
    finally:
        progress.close()
        log.close()
        checkpoints.close()
    return state.ema, outcome


def finite(metrics: dict[str, Any], stage: str, step: int) -> dict[str, float]:
    """The metrics as floats.

    Raises:
        UserError: if one is NaN or infinite.
    """
    values = {name: float(value) for name, value in metrics.items()}
    bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
    if bad:
        raise UserError(
            f"Stage {stage} stopped at step {step}, where {bad}; the last good checkpoint is kept: lower the learning "
            f"rates in config.stages.{stage}.optimizer and start in a new workdir, or look for broken data."
        )
    return values
