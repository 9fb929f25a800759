"""A run: a config, a workdir, and the stages in turn."""

import dataclasses
import functools
import math
import pathlib
from typing import Annotated, Any

import grain
import jax
import jax.numpy as jnp

import walt_jax
from walt_jax.config import Positive, Range
from walt_jax.data.pipeline import DataConfig, Source, batches, open_source
from walt_jax.denoiser.layout import Grid
from walt_jax.denoiser.model import Denoiser, DenoiserConfig
from walt_jax.denoiser.windows import Window
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.errors import UserError
from walt_jax.evaluation.evaluate import EvaluationConfig
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig, unboxed
from walt_jax.generation.sample import Generator
from walt_jax.text import vocabulary
from walt_jax.text.labels import Labels
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.text.vocabulary import Vocabulary
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.inflation import Placement, inflate
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.perceptual import load_features
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.latent_cache import cached_batches, encode_clips, latents_path, packed_batches
from walt_jax.training.loop import ShapeConfig, StageConfig, Trained, run_stage
from walt_jax.training.state import TrainState
from walt_jax.training.statistics import latent_statistics
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask, Task
from walt_jax.training.tokenizer_task import TokenizerTask
from walt_jax.workdir import write_atomically

STATISTICS_CLIPS, STATISTICS_BATCH = 256, 8


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How captions are read.

    Attributes:
        vocab_size: at most this many sentencepiece pieces, trained on the captions.
        length: tokens of a caption; what is longer is cut.
        encoder: of the token embeddings, trained with the denoiser.
    """

    vocab_size: Positive
    length: Positive
    encoder: T5Config


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; a config file's knobs are these fields.

    Without `denoiser`, `diffusion` and `sampling` it is a tokenizer alone that is trained. `text` is there where the
    denoiser attends to text; a denoiser with `classes` takes each distinct caption as a class. `inflation` says which
    tap of a video kernel an image kernel becomes, where a stage on images alone is followed by one on video.
    """

    seed: Annotated[int, Range(0, 2**31 - 1)]
    data: DataConfig
    tokenizer: TokenizerConfig
    stages: dict[str, StageConfig]
    evaluation: EvaluationConfig
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    inflation: Placement = "last"
    text: TextConfig | None = None
    denoiser: DenoiserConfig | None = None
    diffusion: DiffusionConfig | None = None
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    sampling: SamplingConfig | None = None

    def __post_init__(self):
        tasks = [stage.task for stage in self.stages.values()]
        wanted = {"tokenizer"} if self.denoiser is None else {"tokenizer", "denoiser"}
        if sorted(tasks, reverse=True) != tasks or set(tasks) != wanted:
            also = "" if self.denoiser is None else " and then at least one for the denoiser"
            raise ValueError(f"stages are at least one for the tokenizer{also}")
        groups = {name: getattr(self, name) is not None for name in ("denoiser", "diffusion", "sampling")}
        if len(set(groups.values())) > 1:
            missing = next(name for name, given in groups.items() if not given)
            raise ValueError(f"{missing} is missing; denoiser, diffusion and sampling go together")
        if (self.text is not None) != (self.denoiser is not None and self.denoiser.cross_attention):
            raise ValueError("text and denoiser.cross_attention go together: give both or neither")
        shape = self.tokenizer.latent_shape(self.data.frames, self.data.height, self.data.width)
        for name, stage in self.stages.items():
            for kind, changed in stage.shapes.items():
                try:
                    self.tokenizer.latent_shape(*_clip_shape(self.data, changed))
                except ValueError as error:
                    raise ValueError(f"stages.{name}.shapes.{kind}: {error}") from error
        tokenizers = [name for name, stage in self.stages.items() if stage.task == "tokenizer"]
        if self.makes_images(tokenizers[-1]):
            raise ValueError(
                f"stages.{tokenizers[-1]} is the last of the tokenizer and has images alone; let one on video follow, "
                "or make a tokenizer of images: tokenizer.taps=1, no stride in time, data.frames=1"
            )
        if self.denoiser is not None:
            self._check_denoiser(shape)

    def makes_images(self, stage: str) -> bool:
        """Whether a stage trains the tokenizer of images that the next one inflates."""
        config = self.stages[stage]
        return config.task == "tokenizer" and config.of_images and self.tokenizer.taps > 1

    def _check_denoiser(self, shape: tuple[int, ...]) -> None:
        denoiser, conditioning = self.denoiser, self.conditioning
        grid = denoiser.grid(shape[:3])
        for window in denoiser.windows:
            Window(*window).sizes(grid)
        if denoiser.classes and denoiser.cross_attention:
            raise ValueError("denoiser.classes and cross_attention exclude each other: a caption is a class, or a text")
        if (self.diffusion.self_conditioning > 0) != denoiser.self_conditioning:
            raise ValueError(
                f"denoiser.self_conditioning is {denoiser.self_conditioning} and its probability, "
                f"diffusion.self_conditioning, {self.diffusion.self_conditioning:g}; one asks for the other"
            )
        if bool(conditioning.frames) != denoiser.frame_prediction or bool(conditioning.frames) != (
            conditioning.probability > 0
        ):
            raise ValueError("denoiser.frame_prediction, conditioning.frames and its probability go together")
        if conditioning.frames and (denoiser.patch_size[0] > 1 or max(conditioning.frames) >= shape[0]):
            raise ValueError(
                f"conditioning.frames {conditioning.frames} should be fewer than the {shape[0]} latent frames, and "
                "denoiser.patch_size 1 in time"
            )
        scale = denoiser.upscale
        if scale > 1 and (self.data.height % (scale * self.tokenizer.strides[1]) or shape[2] % scale):
            raise ValueError(f"denoiser.upscale={scale} does not divide latents of {shape[:3]}")
        for name, stage in self.stages.items():
            if stage.task == "denoiser" and scale > 1 and stage.cached_clips:
                raise ValueError(f"stages.{name}.cached_clips: what upscales needs the clips, not their latents")
            if stage.pack is None:
                continue
            if self.diffusion.adaptive > 0:
                raise ValueError(f"diffusion.adaptive is for clips of one size; stages.{name} has packs")
            for kind, changed in stage.shapes.items():
                clip = math.prod(denoiser.grid(self.tokenizer.latent_shape(*_clip_shape(self.data, changed))[:3]))
                if clip > stage.pack.tokens:
                    raise ValueError(
                        f"stages.{name}.shapes.{kind} has {clip} tokens a clip, which overflow packs of "
                        f"{stage.pack.tokens}; raise stages.{name}.pack.tokens"
                    )

    @property
    def bounds(self) -> Grid:
        """Tokens along (t, h, w) of the largest clip that the denoiser sees."""
        shapes = [ShapeConfig()]
        for stage in self.stages.values():
            if stage.task == "denoiser":
                shapes += stage.shapes.values()
        latents = [self.tokenizer.latent_shape(*_clip_shape(self.data, shape))[:3] for shape in shapes]
        t, h, w = (max(axis) for axis in zip(*map(self.denoiser.grid, latents), strict=True))
        return t, h, w


def _clip_shape(data: DataConfig, changed: ShapeConfig) -> tuple[int, int, int]:
    """(frames, height, width) of a shape's clips."""
    return changed.frames or data.frames, changed.height or data.height, changed.width or data.width


class Run:
    """A config in a workdir: trains, and hands out what was trained.

    Args:
        config: see `RunConfig`.
        workdir: where everything is written.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.codec = Codec(Tokenizer(config.tokenizer))
        # Opening a folder reads every file's head, and what it decodes is kept.
        self._source = functools.cache(functools.partial(open_source, config.data))

    def unseen(self) -> Source:
        """Clips that training never sees: of drawn ones all combinations, at places, sizes and speeds of their own."""
        return self._source("all" if self.config.data.source == "drawn" else "held_out")

    def check_data(self) -> None:
        """Opens all that will be read.

        Raises:
            UserError: if it can't be.
        """
        self.unseen()
        for stage in self.config.stages.values():
            for shape in stage.shapes.values() or [ShapeConfig()]:
                self._source("train", _clip_shape(self.config.data, shape))
        if self.config.losses.perceptual_weights:
            load_features(self.config.losses.perceptual_weights)
        if self.config.evaluation.perceptual_weights:
            load_features(self.config.evaluation.perceptual_weights)

    def summary(self) -> str:
        """What will be run, how large it is, on what, and where it goes."""
        config = self.config
        devices = jax.devices()
        shape = config.tokenizer.latent_shape(config.data.frames, config.data.height, config.data.width)
        lines = [
            f"walt_jax {walt_jax.__version__}, JAX {jax.__version__}, on {devices[0].device_kind}, 1 of {len(devices)}",
            f"clips     {config.data.frames} × {config.data.height} × {config.data.width} at {config.data.fps:g} frames"
            f" a second from {config.data.source}; latents {' × '.join(map(str, shape))}",
        ]
        for name, stage in config.stages.items():
            params, _ = jax.eval_shape(self._task(name).init, jax.random.key(0))
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            lines.append(
                f"stage     {name}: {stage.task}, {size:,} parameters, {stage.steps:,} steps of {stage.batch_size} "
                + (f"packs of {stage.pack.tokens} tokens" if stage.pack else "clips")
            )
        return "\n".join([*lines, f"workdir   {self.workdir}"])

    def train(self) -> None:
        """Runs every stage to its end; stages that are done cost nothing."""
        names = list(self.config.stages)
        initial: dict[str, Any] = {}  # of each task, what its last stage has trained
        tokenizer = None
        for index, (name, stage) in enumerate(self.config.stages.items()):
            key = jax.random.fold_in(jax.random.key(self.config.seed), index)
            dataset = functools.partial(self._batches, stage, index)
            extras: dict[str, Any] = {"initial": initial.get(stage.task), "later_stages": tuple(names[index + 1 :])}
            images = self.config.makes_images(name)
            if stage.task == "tokenizer":
                if not images:
                    extras["finish"] = self._statistics
            else:
                extras["frozen"] = tokenizer
                if stage.cached_clips:
                    dataset = functools.partial(self._cached, name, stage, index, tokenizer)
            trained = run_stage(name, stage, self._task(name), dataset, self.workdir, key, **extras)
            initial[stage.task] = trained.served
            if images:
                initial[stage.task] = inflate(trained.served, self.config.tokenizer, self.config.inflation)
            elif stage.task == "tokenizer":
                tokenizer = _trained_tokenizer(trained)

    def tokenizer(self) -> TrainedTokenizer:
        """The trained tokenizer.

        Raises:
            UserError: if no stage of it is done, or the workdir's checkpoints are of another config.
        """
        return _trained_tokenizer(self._restore("tokenizer"))

    def generator(self) -> Generator:
        """The trained models.

        Raises:
            UserError: if the config has no denoiser, a stage has not been trained, or the workdir's checkpoints are of
                another config.
        """
        if self.config.denoiser is None:
            raise UserError("This config trains a tokenizer alone: it reconstructs, with --mode=reconstruct.")
        if self.config.denoiser.upscale > 1:
            raise UserError("This config upscales latents; it is sampled from as a stage of a cascade alone.")
        params = self._restore("denoiser").served
        return Generator(self._model(), params, self.tokenizer(), self._captions(), self.config.sampling)

    def _task(self, stage: str) -> Task:
        """What a stage trains."""
        config = self.config
        if config.stages[stage].task == "denoiser":
            return DenoiserTask(self._model(), config.conditioning)
        shape = config.tokenizer.of_images() if config.makes_images(stage) else config.tokenizer
        path = config.losses.perceptual_weights
        return TokenizerTask(Tokenizer(shape), config.losses, load_features(path) if path else None)

    def _restore(self, task_name: str) -> Trained:
        """The newest average of the last stage of a task that has a checkpoint."""
        for name, stage in reversed(self.config.stages.items()):
            directory = self.workdir / "checkpoints" / name
            if stage.task != task_name or self.config.makes_images(name) or not directory.is_dir():
                continue
            checkpoints = Checkpoints(directory)
            if checkpoints.latest_step() is not None:
                task = self._task(name)
                like = jax.eval_shape(lambda key, task=task: task.served(*unboxed(task.init(key))), jax.random.key(0))
                trained = Trained(*checkpoints.restore_ema(like))
                if task_name == "denoiser" or trained.outcome:
                    return trained
        raise UserError(f"{self.workdir} has no trained {task_name} yet; train first, with --mode=train.")

    def make_vocabulary(self) -> bytes | None:
        """A vocabulary of the training clips' captions where the config has text; their list where they are classes.

        Raises:
            UserError: if `text.vocab_size` or `denoiser.classes` does not suit them.
        """
        if self.config.denoiser is None:
            return None
        captions = self._source("train", _clip_shape(self.config.data, ShapeConfig())).captions
        if self.config.text is not None:
            return vocabulary.train(captions, self.config.text.vocab_size)
        if not self.config.denoiser.classes:
            return Labels(()).dump()
        names = sorted({*captions, *self.unseen().captions} - {""})
        if len(names) != self.config.denoiser.classes:
            raise UserError(
                f"The clips have {len(names)} distinct captions and config.denoiser.classes is "
                f"{self.config.denoiser.classes}; set it to that, or --config.data.caption_column to the column that "
                "names each clip's class."
            )
        return Labels(names).dump()

    def keep_vocabulary(self, model: bytes | None) -> None:
        """Writes the run's vocabulary, where it has none yet."""
        if model is not None and not self._vocabulary_path.exists():
            write_atomically(self._vocabulary_path, model)

    @property
    def _vocabulary_path(self) -> pathlib.Path:
        return self.workdir / ("labels.json" if self.config.text is None else "vocabulary.model")

    def _captions(self) -> Vocabulary | Labels:
        """What makes ids of captions."""
        if self.config.text is None:
            return Labels.load(self._vocabulary_path)
        return Vocabulary.load(self._vocabulary_path, self.config.text.length)

    def _model(self) -> LatentDiffusion:
        config = self.config
        shape = config.tokenizer.latent_shape(config.data.frames, config.data.height, config.data.width)
        text = None if config.text is None else T5Encoder(config.text.encoder, self._captions().size)
        denoiser = Denoiser(config.denoiser, config.bounds)
        return LatentDiffusion(self.codec, text, denoiser, config.diffusion, shape)

    def _batches(self, stage: StageConfig, index: int) -> grain.IterDataset:
        """A stage's batches; where it has several shapes, of one after the other, as often as their weights say."""
        shapes = list(stage.shapes.values()) or [ShapeConfig()]
        datasets = [self._batches_of(stage, index, number) for number in range(len(shapes))]
        if len(datasets) == 1:
            return datasets[0]
        return grain.IterDataset.mix(datasets, [shape.weight for shape in shapes])

    def _batches_of(self, stage: StageConfig, index: int, number: int) -> grain.IterDataset:
        """Batches of one of a stage's shapes, the only one where it names none."""
        config = self.config
        shapes = list(stage.shapes.values()) or [ShapeConfig()]
        shape = shapes[number]
        return batches(
            self._source("train", _clip_shape(config.data, shape)),
            shape.batch_size or stage.batch_size,
            (config.seed + index) * len(shapes) + number,
            self._captions().encode if stage.task == "denoiser" else None,
            config.data.caption_dropout,
        )

    def _statistics(self, state: TrainState) -> dict:
        """The latents' mean and deviation, which normalise them for the denoiser."""
        channels = self.config.tokenizer.latent_channels
        raw = TrainedTokenizer(state.ema, jnp.zeros(channels), jnp.ones(channels))
        seed = self.config.seed + len(self.config.stages)  # of its own, beside the stages' seeds
        source = self._source("train", _clip_shape(self.config.data, ShapeConfig()))
        some = batches(source, STATISTICS_BATCH, seed)
        return latent_statistics(lambda video: self.codec.encode(raw, video)[0], some, STATISTICS_CLIPS)

    def _cached(self, name: str, stage: StageConfig, index: int, tokenizer: TrainedTokenizer) -> grain.IterDataset:
        """Batches of clips that are encoded once: of one size, or packs of several."""
        shapes = stage.shapes or {"clips": ShapeConfig()}
        weights = sum(shape.weight for shape in shapes.values())
        arrays = [
            encode_clips(
                latents_path(self.workdir, name) / f"{kind}.npz",
                lambda video: self.codec.encode(tokenizer, video)[0],
                functools.partial(self._batches_of, stage, index, number),
                max(1, round(stage.cached_clips * shape.weight / weights)),
            )
            for number, (kind, shape) in enumerate(shapes.items())
        ]
        seed = self.config.seed + index
        if stage.pack is None:
            return cached_batches(arrays[0], stage.batch_size, seed)
        return packed_batches(arrays, self.config.denoiser, stage.batch_size, stage.pack.tokens, stage.pack.clips, seed)


def _trained_tokenizer(trained: Trained) -> TrainedTokenizer:
    mean, std = (jnp.asarray(trained.outcome[name], jnp.float32) for name in ("latent_mean", "latent_std"))
    return TrainedTokenizer(trained.served, mean, std)
