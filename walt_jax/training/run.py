"""A run: a config, a workdir, and the stages in turn."""

import functools
import itertools
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp

import walt_jax
from walt_jax.data.order import Share
from walt_jax.data.pipeline import Batches, Clips, Data, Source, stream
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.generation.sample import Generator
from walt_jax.text import vocabulary
from walt_jax.text.labels import Labels
from walt_jax.text.vocabulary import Vocabulary
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.tokenizer.inflation import inflate
from walt_jax.tokenizer.perceptual import load_features
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.latent_cache import cached_batches, encode_clips, latents_path, packed_batches
from walt_jax.training.loop import StageConfig, Trained, run_stage
from walt_jax.training.run_config import RunConfig, make_model, make_task
from walt_jax.training.state import TrainState
from walt_jax.training.statistics import latent_statistics
from walt_jax.training.tasks import Task
from walt_jax.workdir import write_atomically

STATISTICS_CLIPS, STATISTICS_BATCH = 256, 8


class Run:
    """A config in a workdir: trains, and hands out what was trained.

    Args:
        config: see `RunConfig`.
        workdir: where everything is written.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.codec = Codec(Tokenizer(config.tokenizer))
        self.data = Data(config.data)

    def unseen(self) -> Source:
        """Clips that training never sees: of drawn ones all combinations, at places, sizes and speeds of their own."""
        split = "all" if self.config.data.source == "drawn" else "held_out"
        return self.data.source(split, (self.config.clip_shape(),))

    def check_data(self) -> None:
        """Opens all that will be read.

        Raises:
            UserError: if it can't be.
        """
        self.unseen()
        for name in self.config.stages:
            self.data.source("train", self.config.clip_shapes(name))
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
            dataset = functools.partial(self._batches, name, index)
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
                tokenizer = self._trained_tokenizer(trained)

    def tokenizer(self) -> TrainedTokenizer:
        """The trained tokenizer.

        Raises:
            UserError: if no stage of it is done, or the workdir's checkpoints are of another config.
        """
        return self._trained_tokenizer(self._restore("tokenizer"))

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
        return Generator(
            make_model(self.config, self._vocab_size()),
            params,
            self.tokenizer(),
            self._captions(),
            self.config.sampling,
        )

    def _task(self, stage: str) -> Task:
        """What a stage trains."""
        return make_task(self.config, stage, self._vocab_size())

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
        captions = self.data.source("train", (self.config.clip_shape(),)).captions
        if self.config.text is not None:
            return vocabulary.train(captions, self.config.text.vocab_size)
        if not self.config.denoiser.classes:
            return Labels(()).dump()
        names = sorted({*captions, *self.unseen().captions} - {""})
        if len(names) != self.config.denoiser.classes:
            raise UserError(
                f"The clips have {len(names)} distinct captions and config.denoiser.classes is "
                f"{self.config.denoiser.classes}; set it to that, or --config.data.captions to the column that "
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

    def _vocab_size(self) -> int:
        return 0 if self.config.text is None else self._captions().size

    def _batches(self, name: str, index: int) -> grain.IterDataset:
        """A stage's batches of clips, of one shape each."""
        clips = self._clips(name, index)
        return Batches(clips, self.config.batch_sizes(name))

    def _clips(self, name: str, index: int) -> Clips:
        """A stage's clips, in its shapes."""
        config = self.config
        encode = self._captions().encode if config.stages[name].task == "denoiser" else None
        source = self.data.source("train", config.clip_shapes(name))
        return Clips(source, config.seed + index, encode, config.data.caption_dropout)

    def _statistics(self, state: TrainState) -> dict:
        """The latents' mean and deviation, which normalise them for the denoiser."""
        channels = self.config.tokenizer.latent_channels
        raw = TrainedTokenizer(state.ema, jnp.zeros(channels), jnp.ones(channels))
        seed = self.config.seed + len(self.config.stages)  # of its own, beside the stages' seeds
        source = self.data.source("train", (self.config.clip_shape(),))
        some = Batches(Clips(source, seed), (STATISTICS_BATCH,))
        return latent_statistics(lambda video: self.codec.encode(raw, video)[0], some, STATISTICS_CLIPS)

    def _trained_tokenizer(self, trained: Trained) -> TrainedTokenizer:
        if not self.config.normalise_latents:
            channels = self.config.tokenizer.latent_channels
            return TrainedTokenizer(trained.served, jnp.zeros(channels), jnp.ones(channels))
        mean, std = (jnp.asarray(trained.outcome[name], jnp.float32) for name in ("latent_mean", "latent_std"))
        return TrainedTokenizer(trained.served, mean, std)

    def _cached(self, name: str, stage: StageConfig, index: int, tokenizer: TrainedTokenizer) -> grain.IterDataset:
        """Batches of clips that are encoded once: of one size, or packs of several."""
        shapes = encode_clips(
            latents_path(self.workdir, name),
            lambda video: self.codec.encode(tokenizer, video)[0],
            lambda: itertools.islice(stream(self._clips(name, index), Share()), stage.cached_clips),
            stage.cached_clips,
        )
        seed = self.config.seed + index
        if stage.pack is None:
            return cached_batches(shapes[0], stage.batch_size, seed)
        return packed_batches(shapes, self.config.denoiser, stage.batch_size, stage.pack.tokens, stage.pack.clips, seed)
