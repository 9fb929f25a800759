"""A run: a config, a workdir, and the stages in turn."""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any, Literal

import grain
import jax
import jax.numpy as jnp

import walt_jax
from walt_jax.config import Fraction, Positive, Range
from walt_jax.data.pipeline import DataConfig, Source, batches, open_source
from walt_jax.denoiser.model import Denoiser, DenoiserConfig
from walt_jax.denoiser.windows import Window
from walt_jax.errors import UserError
from walt_jax.evaluation.evaluate import EvaluationConfig
from walt_jax.generation.sample import Generator
from walt_jax.generation.text_to_video import SamplingConfig, TextToVideo, TrainedTokenizer, to_float, unboxed
from walt_jax.text import vocabulary
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.latent_cache import cached_batches, encode_clips, latents_path
from walt_jax.training.loop import StageConfig, run_stage
from walt_jax.training.state import TrainState
from walt_jax.training.statistics import latent_statistics
from walt_jax.training.tasks import DenoiserTask, TokenizerTask
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
class DiffusionConfig:
    """The objective.

    Attributes:
        schedule: "linear" (zero terminal SNR, W.A.L.T's) or "cosine".
        self_conditioning: probability that a training clip sees the model's own first estimate; W.A.L.T: 0.9.
    """

    schedule: Literal["linear", "cosine"]
    self_conditioning: Fraction


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of; a config file's knobs are these fields."""

    seed: Annotated[int, Range(0, 2**31 - 1)]
    data: DataConfig
    text: TextConfig
    tokenizer: TokenizerConfig
    denoiser: DenoiserConfig
    diffusion: DiffusionConfig
    stages: dict[str, StageConfig]
    sampling: SamplingConfig
    evaluation: EvaluationConfig

    def __post_init__(self):
        tasks = [stage.task for stage in self.stages.values()]
        if sorted(tasks, reverse=True) != tasks or len(set(tasks)) != 2:
            raise ValueError("stages are at least one for the tokenizer and then at least one for the denoiser")
        patch = self.denoiser.patch_size
        shape = self.tokenizer.latent_shape(self.data.frames, self.data.height, self.data.width)
        if any(length % size for length, size in zip(shape, patch, strict=False)):
            raise ValueError(f"denoiser.patch_size {patch} does not divide latents of {shape[:3]}")
        grid = tuple(length // size for length, size in zip(shape, patch, strict=False))
        for window in self.denoiser.windows:
            Window(*window).sizes(grid)
        for name, stage in self.stages.items():
            if stage.frames is not None:
                self.tokenizer.latent_shape(stage.frames, self.data.height, self.data.width)
                if stage.task == "denoiser" and stage.frames != self.data.frames:
                    raise ValueError(f"stages.{name}.frames is {stage.frames}; a denoiser takes data.frames")
        if (self.diffusion.self_conditioning > 0) != self.denoiser.self_conditioning:
            raise ValueError(
                f"denoiser.self_conditioning is {self.denoiser.self_conditioning} and its probability, "
                f"diffusion.self_conditioning, {self.diffusion.self_conditioning:g}; one asks for the other"
            )


class Run:
    """A config in a workdir: trains, and hands out what was trained.

    Args:
        config: see `RunConfig`.
        workdir: where everything is written.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.tokenizer = Tokenizer(config.tokenizer)
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
            self._source("train", stage.frames)

    def summary(self) -> str:
        """What will be run, how large it is, on what, and where it goes."""
        config = self.config
        model = self._model(self._vocabulary())
        tasks = {"tokenizer": TokenizerTask(self.tokenizer), "denoiser": DenoiserTask(model, 0.0)}
        sizes = {
            name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
            for name, task in tasks.items()
        }
        devices = jax.devices()
        lines = [
            f"walt_jax {walt_jax.__version__}, JAX {jax.__version__}, on {devices[0].device_kind}, 1 of {len(devices)}",
            f"clips     {config.data.frames} × {config.data.height} × {config.data.width} at {config.data.fps:g} frames"
            f" a second from {config.data.source}; latents {' × '.join(map(str, model.latent_shape))}",
        ]
        lines += [
            f"stage     {name}: {stage.task}, {sizes[stage.task]:,} parameters, {stage.steps:,} steps of "
            f"{stage.batch_size} clips"
            for name, stage in config.stages.items()
        ]
        return "\n".join([*lines, f"workdir   {self.workdir}"])

    def train(self) -> None:
        """Runs every stage to its end; stages that are done cost nothing."""
        model = self._model(self._vocabulary())
        names = list(self.config.stages)
        initial: dict[str, Any] = {}  # of each task, what its last stage has trained
        tokenizer = None
        for index, (name, stage) in enumerate(self.config.stages.items()):
            source = self._source("train", stage.frames)
            key = jax.random.fold_in(jax.random.key(self.config.seed), index)
            dataset = functools.partial(self._batches, source, stage, index)
            extras: dict[str, Any] = {"initial": initial.get(stage.task), "later_stages": tuple(names[index + 1 :])}
            if stage.task == "tokenizer":
                task: Any = TokenizerTask(self.tokenizer)
                extras["finish"] = functools.partial(self._statistics, source)
            else:
                task = DenoiserTask(model, self.config.diffusion.self_conditioning)
                extras["frozen"] = tokenizer
                if stage.cached_clips:
                    dataset = functools.partial(self._cached, name, source, stage, index, model, tokenizer)
            ema, outcome = run_stage(name, stage, task, dataset, self.workdir, key, **extras)
            initial[stage.task] = ema
            if stage.task == "tokenizer":
                tokenizer = _trained_tokenizer(ema, outcome)

    def generator(self) -> Generator:
        """The trained models.

        Raises:
            UserError: if a stage has not been trained, or the workdir's checkpoints are of another config.
        """
        vocab = self._vocabulary()
        model = self._model(vocab)
        ema, outcome = self._restore("tokenizer", TokenizerTask(self.tokenizer))
        params, _ = self._restore("denoiser", DenoiserTask(model, 0.0))
        return Generator(model, params, _trained_tokenizer(ema, outcome), vocab, self.config.sampling)

    def _restore(self, task_name: str, task: Any) -> tuple[Any, dict]:
        """The newest average of the last stage of a task that has a checkpoint."""
        like = jax.eval_shape(lambda key: unboxed(task.init(key)), jax.random.key(0))
        for name in reversed([name for name, stage in self.config.stages.items() if stage.task == task_name]):
            directory = self.workdir / "checkpoints" / name
            if not directory.is_dir():
                continue
            checkpoints = Checkpoints(directory)
            if checkpoints.latest_step() is not None:
                ema, outcome = checkpoints.restore_ema(like)
                if task_name == "denoiser" or outcome:
                    return ema, outcome
        raise UserError(f"{self.workdir} has no trained {task_name} yet; train first, with --mode=train.")

    def make_vocabulary(self) -> bytes:
        """A vocabulary of the training clips' captions.

        Raises:
            UserError: if `text.vocab_size` does not suit them.
        """
        return vocabulary.train(self._source("train", None).captions, self.config.text.vocab_size)

    def keep_vocabulary(self, model: bytes) -> None:
        """Writes the run's vocabulary, where it has none yet."""
        if not self._vocabulary_path.exists():
            write_atomically(self._vocabulary_path, model)

    @property
    def _vocabulary_path(self) -> pathlib.Path:
        return self.workdir / "vocabulary.model"

    def _vocabulary(self) -> vocabulary.Vocabulary:
        return vocabulary.Vocabulary.load(self._vocabulary_path, self.config.text.length)

    def _model(self, vocab: vocabulary.Vocabulary) -> TextToVideo:
        config = self.config
        shape = config.tokenizer.latent_shape(config.data.frames, config.data.height, config.data.width)
        return TextToVideo(
            self.tokenizer,
            T5Encoder(config.text.encoder, vocab.size),
            Denoiser(config.denoiser),
            config.diffusion.schedule,
            shape,
        )

    def _batches(self, source: Source, stage: StageConfig, index: int) -> grain.IterDataset:
        vocab = self._vocabulary()
        dropout = self.config.data.caption_dropout
        return batches(source, vocab.encode, stage.batch_size, self.config.seed + index, dropout)

    def _statistics(self, source: Source, state: TrainState) -> dict:
        @jax.jit
        def encode(params, video):
            return self.tokenizer.apply({"params": params}, to_float(video), method="encode")

        seed = self.config.seed + len(self.config.stages)  # of its own, beside the stages' seeds
        some = batches(source, self._vocabulary().encode, STATISTICS_BATCH, seed, 0.0)
        return latent_statistics(functools.partial(encode, state.ema), some, STATISTICS_CLIPS)

    def _cached(
        self,
        name: str,
        source: Source,
        stage: StageConfig,
        index: int,
        model: TextToVideo,
        tokenizer: TrainedTokenizer,
    ) -> grain.IterDataset:
        encode = jax.jit(model.encode)
        arrays = encode_clips(
            latents_path(self.workdir, name),
            functools.partial(encode, tokenizer),
            functools.partial(self._batches, source, stage, index),
            stage.cached_clips,
        )
        return cached_batches(arrays, stage.batch_size, self.config.seed + index)


def _trained_tokenizer(ema: Any, outcome: dict) -> TrainedTokenizer:
    mean, std = (jnp.asarray(outcome[name], jnp.float32) for name in ("latent_mean", "latent_std"))
    return TrainedTokenizer(ema, mean, std)
