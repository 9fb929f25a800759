"""A stage's loop: restore, step, log, save."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np
import optax
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import Mesh

from walt_jax.clock import Clock
from walt_jax.config import Fraction, Positive
from walt_jax.data.dropping import DropConfig
from walt_jax.data.shapes import ShapeConfig
from walt_jax.diffusion.alpha_flow import AlphaFlowConfig
from walt_jax.diffusion.motion_error import NO_MOTION, MotionConfig
from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.generation.lora import LoraConfig
from walt_jax.parallel.mesh import data_shards, local_shards, on_own_devices, place_batch
from walt_jax.parallel.processes import agreed_stop, exchanged, merged, one_after_the_first, ready, together
from walt_jax.parallel.rules import Rules
from walt_jax.staging import staging
from walt_jax.training.checkpoint import Checkpoints, Keep, set_aside
from walt_jax.training.few_steps import DistillationConfig
from walt_jax.training.init_from import completed
from walt_jax.training.latent_batches import latents_path
from walt_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from walt_jax.training.preview import Preview, due, write_preview
from walt_jax.training.profiling import Profile, Steps
from walt_jax.training.stage_log import Peak, StageLog, Work
from walt_jax.training.state import ONCE_OPTIONS, TrainState, abstract_state, make_train_step, state_shardings
from walt_jax.training.step_programs import StepPrograms
from walt_jax.training.stopping import Stopped, stop_signals
from walt_jax.training.tasks import Task
from walt_jax.training.validation import PREFIX, Validation
from walt_jax.workdir import write_atomically

BATCHES_AHEAD = 2

Windows = tuple[tuple[Positive | None, Positive | None, Positive | None], ...]


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """How clips of several shapes share a sequence.

    Attributes:
        tokens: length of a pack.
        clips: maximum number of clips in a pack.
        drop: which tokens of a clip are dropped in training; None drops none.
        frames: how many latent frames of a clip are trained on at once, in groups with gaps between them that are drawn
            anew each epoch, see `data.frame_groups`; 0 is all of them. Longer videos are then sampled by a schedule,
            `sampling.schedule`, up to the length of the clips.
        packers: how many choose packs, independently, each from its own clips; divides the batch size. Which packs come
            depends on it. Each process does the work of those that make its rows, so with one of them all processes
            choose the packs of the whole batch: let each process have one where that takes longer than a step.
    """

    tokens: Positive
    clips: Positive
    drop: DropConfig | None = None
    frames: int = 0
    packers: Positive = 1

    def __post_init__(self):
        if self.frames and self.drop is not None:
            raise ValueError("drop and frames both say what is kept of a clip; set one of them")
        if self.frames == 1:
            raise ValueError("frames=1 leaves nothing to be conditioned on; keep at least 2")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run.

    Attributes:
        task: "tokenizer" or "denoiser".
        steps: optimizer steps.
        batch_size: clips a step.
        accumulate: micro-batches that a step's gradients are accumulated over, in the memory of one, see
            `accumulation`; divides each batch size.
        optimizer: see `OptimizerConfig`.
        shapes: sizes and lengths of the clips, by names of your own; without any, clips have the data's. Each batch
            has clips of one shape. A tokenizer stage with images only trains a tokenizer of images, which the next
            stage inflates.
        windows: of a denoiser stage, instead of `denoiser.windows`. Where these or the largest clip differ from the
            stage before, tables of positions are interpolated, see `denoiser.resize`.
        motion: of a denoiser stage: weights of errors of motion in the loss, see `diffusion.motion_error`.
        distillation: of a denoiser stage after another, or with `init_from`: see `few_steps.DistillationConfig`.
        alpha_flow: of a denoiser stage with `denoiser.mean_velocity`: see `diffusion.alpha_flow`.
        pack: of a denoiser stage: clips of all shapes share sequences; `batch_size` then counts packs.
        lora: of a denoiser stage: instead of the model's parameters, LoRA's are trained; the model is that of
            `init_from`, see `training.lora_task`.
        ema_decay: of the parameters' moving average; 0 keeps none, and the parameters themselves are served.
        cached_clips: of a denoiser stage: how many clips are encoded into the workdir before its first step. None is
            each clip of the data once; with more than there are, windows and crops are drawn anew each epoch; 0
            encodes the clips of each batch in its step, every epoch again.
        latents: of a denoiser stage: a data set that `--mode=encode` has written, instead of clips to be encoded.
        log_every: steps between lines of `metrics.jsonl`.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_last: how many of the newest checkpoints are kept.
        keep_best: how many of the best are kept, by a metric's mean over the steps since the checkpoint before.
        keep_metric: its name in `metrics.jsonl`; the least is best, the greatest with a + in front, as in "+psnr_db".
            What `validate_every` measures, such as "validation_loss", is then measured at each checkpoint too.
        keep_every_hours: every so many hours a checkpoint is kept for good; 0 keeps none for its age.
        preview_every: steps between renewals of `preview.png` in the workdir, and between videos in its `previews/`:
            reconstructions or samples of unseen clips. The first come after 1/8, 1/4 and 1/2 of it.
        validate_every: steps between measurements of unseen clips with the averaged parameters, see `validation`, and
            `evaluation.validation_clips`; after the last step too. 0 measures none.
    """

    task: Literal["tokenizer", "denoiser"]
    steps: Positive
    batch_size: Positive
    optimizer: OptimizerConfig
    accumulate: Positive = 1
    shapes: dict[str, ShapeConfig] = dataclasses.field(default_factory=dict)
    windows: Windows | None = None
    pack: PackConfig | None = None
    lora: LoraConfig | None = None
    motion: MotionConfig = dataclasses.field(default_factory=MotionConfig)
    distillation: DistillationConfig | None = None
    alpha_flow: AlphaFlowConfig | None = None
    ema_decay: Fraction = 0.999
    cached_clips: int | None = None
    latents: str = ""
    log_every: Positive = 10
    checkpoint_every: Positive = 500
    keep_last: Positive = 2
    keep_best: int = 0
    keep_metric: str = "loss"
    keep_every_hours: float = 0.0
    preview_every: Positive = 1000
    validate_every: int = 0

    def __post_init__(self):
        if self.keep_best and self.keeps_by_validation and not self.validate_every:
            raise ValueError(f"keep_metric is {self.keep_metric!r}, which is measured with validate_every: set that")
        if self.task == "tokenizer" and (self.cached_clips or self.latents or self.windows):
            raise ValueError("cached_clips, latents and windows are for denoiser stages")
        if self.task == "tokenizer" and (self.lora or self.distillation or self.alpha_flow):
            raise ValueError("lora, distillation and alpha_flow are for denoiser stages")
        if self.task == "tokenizer" and self.motion != NO_MOTION:
            raise ValueError("motion is for denoiser stages")
        if sum(map(bool, (self.lora, self.distillation, self.alpha_flow))) > 1:
            raise ValueError("lora, distillation and alpha_flow do not go with each other")
        if self.task == "tokenizer" and self.pack:
            raise ValueError("pack is for denoiser stages; a tokenizer's batches have one shape each")
        if self.pack and self.batch_size % self.pack.packers:
            raise ValueError(f"pack.packers={self.pack.packers} does not divide batches of {self.batch_size} packs")
        if self.task == "denoiser" and self.pack and not self.shapes:
            raise ValueError("pack needs shapes: those of the clips that share a pack")

    @property
    def keeps_by_validation(self) -> bool:
        """Whether the best checkpoints are those with the best measurement of unseen clips."""
        return self.keep_best > 0 and self.keep_metric.removeprefix("+").startswith(PREFIX)

    @property
    def caches(self) -> bool:
        """Whether clips are encoded into the workdir before the first step."""
        return self.task == "denoiser" and not self.latents and self.cached_clips != 0

    @property
    def encodes(self) -> bool:
        """Whether the clips of each batch are encoded for its step."""
        return self.task == "denoiser" and not self.latents and self.cached_clips == 0

    @property
    def of_images(self) -> bool:
        """Whether all clips are images."""
        return bool(self.shapes) and all(shape.frames == 1 for shape in self.shapes.values())


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage hands on: what it serves, averaged, and what `finish` measured."""

    served: Any
    outcome: dict


def run_stage(
    name: str,
    stage: StageConfig,
    task: Task,
    dataset: Callable[[], grain.IterDataset],
    workdir: pathlib.Path,
    key: jax.Array,
    mesh: Mesh,
    *,
    rules: Rules = (),
    initial: Any = None,
    fit: Callable[[Any], Any] = lambda params: params,
    frozen: Any = None,
    finish: Callable[[Any], dict] = lambda served: {},
    later_stages: tuple[str, ...] = (),
    gone: Callable[[], Sequence[str]] = tuple,
    preview: Callable[[], Preview] | None = None,
    validation: Callable[[], Validation] | None = None,
    peak: Peak | None = None,
    profile: Steps | None = None,
    clock: Clock | None = None,
) -> Trained:
    """Trains a stage to its end, from where it was stopped if it was.

    Args:
        name: of the stage, and of its folder in `workdir/checkpoints`.
        stage: see `StageConfig`.
        task: parameters and loss.
        dataset: makes the batches; not called where the stage is done already.
        workdir: the run's folder.
        key: of the initialisation and, folded with the step, of all of the stage's randomness.
        mesh: what the state and the batches are divided over, see `parallel.mesh`.
        rules: how, where not by `parallel.rules.DEFAULT_RULES`.
        initial: what an earlier stage of the task has served, to start from; what it lacks starts afresh.
        fit: adapts fresh parameters to the data before the first step; not called where the stage has a checkpoint.
        frozen: passed to the loss; it is on all devices.
        finish: measures something (JSON) on what the last state serves, to be kept in its checkpoint.
        later_stages: names of those that start from this one. Once this stage has saved a step of its own, what they
            left is set aside: renamed, for it will be made again from this stage's new end.
        gone: the files that have vanished so far; their number is logged.
        preview: makes what draws `preview.png`; called before the first one.
        validation: makes what measures unseen clips; called before the first measurement.
        peak: what MFU is a fraction of.
        profile: first and last of the steps to trace into `workdir/profile/NAME`, counted from the first one done here.
        clock: where the time is accounted for.

    Raises:
        UserError: if a loss is not finite, or a checkpoint can't be written; the last good checkpoint is kept.
        Stopped: if SIGINT or SIGTERM asked for it; the last step is saved.
    """
    clock = clock or Clock()
    key_init, key_steps = jax.random.split(key)
    optimizer = make_optimizer(stage.optimizer, stage.steps, jax.eval_shape(task.init, key_init)[0])
    keep = Keep(stage.keep_last, stage.keep_best, stage.keep_every_hours)
    # Logged steps are in the workdir before the checkpoint is, for they are not done again.
    folder = workdir / "checkpoints" / name
    checkpoints = Checkpoints(folder, writer=True, keep=keep, before_commit=staging(workdir).upload)
    scored = stage.keep_metric.removeprefix("+")
    score = scored if stage.keep_best and not stage.keeps_by_validation else None
    try:
        like = abstract_state(task, optimizer, mesh, rules, stage.ema_decay)
        state, position, outcome = _restored_or_fresh(
            checkpoints, task, optimizer, stage.ema_decay, like, key_init, initial, fit
        )
        start = int(state.step)
        if start >= stage.steps:
            return Trained(state.served(task), outcome)
        with on_own_devices():
            done = np.arange(stage.steps)
            rates = {n: np.asarray(jax.jit(r)(done)) for n, r in learning_rates(stage.optimizer, stage.steps).items()}
        divided = state_shardings(like)
        train_step = make_train_step(task, optimizer, stage.ema_decay, divided=divided, accumulate=stage.accumulate)
        with (
            contextlib.closing(made_ahead(dataset(), position)) as iterator,
            contextlib.closing(
                StageLog(workdir, name, stage.steps, start, stage.log_every, gone, mesh, peak, score, clock, rates)
            ) as log,
            contextlib.closing(StepPrograms(train_step, one_shape=stage.pack is not None)) as programs,
            contextlib.closing(Profile(workdir, name, profile)) as trace,
            stop_signals() as stop,
        ):
            clock.row("other")
            everywhere = data_shards(mesh) // max(1, len(local_shards(mesh)))
            together = jax.process_count() > 1  # nothing is left out that other processes may do
            sheet = validate = None
            pending = None  # the last step's metrics: fetched a step late, so that the device never waits for the host
            for step in range(start + 1, stage.steps + 1):
                asked = time.perf_counter()
                batch = next(iterator)
                began = time.perf_counter()
                waited = began - asked
                clock.add("data_wait", waited)
                with trace.step(step):
                    state, metrics, again = programs(state, frozen, place_batch(batch, mesh), key_steps)
                stop.unsaved = True
                trace.done(metrics)
                if programs.compiled:
                    log.paused()
                    clock.add("compile", time.perf_counter() - began)
                if again:
                    log.warn(step, again)
                if pending:
                    log.report(*pending)
                tokens, valid = tokens_of(task, batch)
                pending = (
                    step,
                    Work(clips_of(batch) * everywhere, valid, waited, programs.flops * valid / tokens),
                    metrics,
                )
                last = step == stage.steps
                signal = 0 if last else agreed_stop(stop.signal, name, step)
                saves = bool(last or signal or step % stage.checkpoint_every == 0)
                measures = validation is not None and not signal and validates(stage, step, saves)
                if saves or measures:
                    log.report(*pending)  # first: a state that is not finite must not be kept
                    pending = None
                values: dict[str, float] = {}
                if measures:
                    with contextlib.nullcontext() if together else stop.skipped(), clock.span("evaluation"):
                        validate = validate or validation()
                        values, protocols = validate(state.served(task))
                        log.validated(step, values, protocols)
                    if stage.keeps_by_validation and values and scored not in values:
                        raise UserError(
                            f"config.stages.{name}.keep_metric is {scored!r}, which is not measured; choose one of "
                            f"{', '.join(values)}."
                        )
                if saves:
                    with clock.span("evaluation"):
                        outcome = finish(state.served(task)) if last else {}
                    if last:
                        signal = max(exchanged(stop.signal))
                    mean = values.get(scored) if stage.keeps_by_validation else log.mean_of_scored()
                    better = mean if stage.keep_metric.startswith("+") or mean is None else -mean
                    with clock.span("checkpoint"):
                        checkpoints.save(state, merged(exchanged(iterator.get_state())), outcome, better)
                    stop.unsaved = False
                    log.paused()
                    if later_stages:
                        checkpoints.wait()
                        for later in later_stages:
                            _set_aside(workdir, later, log)
                        later_stages = ()
                    if signal:
                        with clock.span("checkpoint"):
                            checkpoints.wait()
                        raise Stopped(signal, name, step)
                if preview and (together or not stop.signal) and due(step, stage.preview_every):
                    with contextlib.nullcontext() if together else stop.skipped(), clock.span("evaluation"):
                        sheet = sheet or preview()
                        write_preview(workdir, name, step, sheet(state.served(task)))
                    log.paused()
        return Trained(state.served(task), outcome)
    finally:
        checkpoints.close()


def validates(stage: StageConfig, step: int, saves: bool) -> bool:
    """Whether unseen clips are measured after a step, at which a checkpoint is saved or not."""
    if not stage.validate_every:
        return False
    return step % stage.validate_every == 0 or step == stage.steps or (saves and stage.keeps_by_validation)


def _set_aside(workdir: pathlib.Path, stage: str, log: "StageLog") -> None:
    """Renames what a stage left; its lines of `metrics.jsonl` go with it."""
    with one_after_the_first() as first:
        if first:
            aside = set_aside(workdir / "checkpoints" / stage, "set-aside")
            set_aside(latents_path(workdir, stage), "set-aside")
            lines = log.remove(stage)
            if aside is not None:
                write_atomically(aside / "metrics.jsonl", lines)


def made_ahead(dataset: grain.IterDataset, position: dict | None) -> grain.DatasetIterator:
    """The batches from a position on, made in a thread while the device is busy; its place is the caller's."""
    iterator = iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=BATCHES_AHEAD))
    if position is not None:
        iterator.set_state(position)
    return iterator


def clips_of(batch: Any) -> int:
    """How many clips a batch has."""
    if "pack" in batch:
        return int((batch["pack"].sizes[..., 0] > 0).sum())
    return len(jax.tree.leaves(batch)[0])


def tokens_of(task: Task, batch: Any) -> tuple[int, int]:
    """How many tokens a batch has, and how many of them are no padding; a tokenizer's tokens are latent positions."""
    if "pack" in batch:
        segments = batch["pack"].positions[..., 0]
        return segments.size, int((segments >= 0).sum())
    count = task.tokens(batch)
    return count, count


def _restored_or_fresh(
    checkpoints: Checkpoints,
    task: Task,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    like: TrainState,
    key: jax.Array,
    initial: Any,
    fit: Callable[[Any], Any],
) -> tuple[TrainState, dict | None, dict]:
    """(state, the data's position, what `finish` measured): of the newest checkpoint, or those to begin with."""

    def fresh(initial: Any) -> tuple[Any, Any]:
        params, moving = map(unboxed, task.init(key))
        if initial is not None:
            params, moving = task.start(params, moving, completed(initial, task.served(params, moving)))
        return params, moving

    def state(params: Any, moving: Any) -> TrainState:
        return TrainState.create(params, moving, task, optimizer, ema_decay)

    if checkpoints.steps():
        return checkpoints.restore(like)
    # Each part is made where it will be: no device ever holds all of a divided state.
    divided, options = state_shardings(like), ONCE_OPTIONS.get(jax.default_backend())
    make = jax.jit(fresh, out_shardings=(divided.params, divided.moving), compiler_options=options)
    ready(make, initial)
    params, moving = make(initial)
    made = jax.jit(state, out_shardings=divided, compiler_options=options)
    return together(made, fit(params), moving), None, {}
