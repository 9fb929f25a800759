"""A run: a config, a workdir, and the stages one after the other."""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

import walt_jax
from walt_jax.clock import Clock
from walt_jax.config import build
from walt_jax.data.batches import Batches
from walt_jax.data.pipeline import Clips
from walt_jax.denoiser import published_weights
from walt_jax.denoiser.resize import resize
from walt_jax.errors import UserError
from walt_jax.evaluation.distances import choose
from walt_jax.evaluation.features import digest_of
from walt_jax.generation import lora_files
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.generation.lora import merged
from walt_jax.generation.low_res import LowRes
from walt_jax.parallel import hardware
from walt_jax.parallel.memory import device_bytes, memory_bytes
from walt_jax.parallel.mesh import check_rows, described, make_mesh, on, replicated
from walt_jax.parallel.processes import exchanged, fetched, is_first, together
from walt_jax.parallel.rules import check_rules
from walt_jax.remote import resolved
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.tokenizer.inflation import inflate
from walt_jax.tokenizer.perceptual import load_features
from walt_jax.training import preview, validation
from walt_jax.training.checkpoint import Checkpoints, saved_steps
from walt_jax.training.init_from import LEAST, TABLES, take
from walt_jax.training.latent_batches import latents_path
from walt_jax.training.loop import Trained, run_stage
from walt_jax.training.lora_task import Frozen, LoraTask
from walt_jax.training.manifest import MANIFEST
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.profiling import Steps
from walt_jax.training.run_config import (
    RunConfig,
    make_codec,
    make_model,
    make_task,
    only_published,
    read_autoencoder,
)
from walt_jax.training.run_data import RunData, digest
from walt_jax.training.run_text import FILES as CAPTIONS
from walt_jax.training.run_text import RunText
from walt_jax.training.stage_log import Peak
from walt_jax.training.state import abstract_state
from walt_jax.training.statistics import latent_statistics
from walt_jax.training.tasks import Task
from walt_jax.workdir import CONFIG, copy_folder, folder_of, read_config, remove_folder, write_atomically

STATISTICS_CLIPS, STATISTICS_BATCH = 256, 8
BLOCK_CLIPS = 128  # more clips change the principal components little
# Folders of the workdir: copies of what is needed of other runs' tokenizers, and of the one that LoRA changes.
TOKENIZER, LOW_RES, BASE = "tokenizer", "low_res", "base"


class Run:
    """A config with its workdir: trains the stages, and returns the trained models.

    Args:
        config: see `RunConfig`.
        workdir: the folder of the run, where everything is written.
        loras: "PATH[:WEIGHT]" of LoRAs that change the trained denoiser, see `generation.lora_files`.

    Attributes:
        codec: pixels to latents and back.
        text: encodes captions.
        data: the clips.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path, loras: Sequence[str] = ()):
        self.config, self.workdir = config, workdir
        self.loras = tuple(map(lora_files.Chosen.parse, loras))
        self.codec = make_codec(config)
        self.text = RunText(config, workdir)
        self.data = RunData(config, workdir, self.codec, self.text, self.low_res, lambda: self.mesh)
        self._low_res: LowRes | None = None  # read from its checkpoint once

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices.

        Raises:
            UserError: if `config.mesh` does not fit them.
        """
        mesh = make_mesh(self.config.mesh, jax.devices())
        check_rules(self.config.rules, mesh)
        return mesh

    def on_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Within, programs run on all devices of the mesh."""
        return on(self.mesh, self.config.rules)

    def check(self) -> None:
        """Opens everything that training will read.

        Raises:
            UserError: if something can't be read, or a stage does not fit the mesh or the memory.
        """
        self._check_memory()
        self.data.check()
        self.text.check()
        if self.config.tokenizer_from and not self.config.takes_autoencoder:
            self._other_run()
        self.low_res()
        self._initial(before_training=True)
        if self._lora_stage and not _holds(self.workdir / BASE):
            self._check_base()
        for path in (self.config.losses.perceptual_weights, self.config.evaluation.perceptual_weights):
            if path:
                load_features(path)
        evaluation = self.config.evaluation
        if evaluation.distances:
            choose(evaluation.distances, evaluation.weights, images=False, stand_in=True)

    def _check_memory(self) -> None:
        """Compares each stage with the mesh and the memory, before minutes are spent on data and compilation.

        Raises:
            UserError: if the mesh does not divide it, or its state is larger than a device's memory.
        """
        memory = memory_bytes()
        shared = self.mesh.size if self.mesh.devices.flat[0].platform == "cpu" else 1  # devices of one memory
        if self.config.denoiser is not None and self.config.denoiser.heads % self.mesh.shape["tensor"]:
            raise UserError(
                f"config.denoiser.heads is {self.config.denoiser.heads}, which config.mesh.tensor="
                f"{self.mesh.shape['tensor']} does not divide; make tensor a divisor of heads."
            )
        for name in self.config.trained_stages:
            stage, task = self.config.stages[name], make_task(self.config, name, self.config.most_pieces)
            for size in self.config.batch_sizes(name):
                what = "A batch" if stage.accumulate == 1 else "A micro-batch"
                check_rows(f"{what} of stage {name}", size // stage.accumulate, self.mesh)
            boxed, _ = jax.eval_shape(task.init, jax.random.key(0))
            optimizer = make_optimizer(stage.optimizer, stage.steps, boxed)
            state = abstract_state(task, optimizer, self.mesh, self.config.rules, stage.ema_decay)
            needed = shared * (device_bytes(state) + device_bytes(state.params))  # the gradients
            if stage.lora is not None:
                needed += shared * device_bytes(self._shapes_of_base(task))
            if memory is not None and needed > memory:
                count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
                more = "" if self.mesh.size == 1 else ", or config.mesh.fsdp larger"
                raise UserError(
                    f"Stage {name} can't fit: its {count:,} parameters, with optimizer, average and gradients, take "
                    f"{needed / 1e9:,.1f} GB{' a device' if self.mesh.size > 1 else ''}, and there are "
                    f"{memory / 1e9:,.1f}; make dim, layers or channels smaller{more}."
                )

    def summary(self) -> str:
        """A text on the stages, their sizes, the data, the device and the workdir."""
        config = self.config
        devices, mesh = jax.devices(), self.mesh
        shape = config.tokenizer.latent_shape(config.data.frames, config.data.height, config.data.width)
        lines = [
            f"walt_jax {walt_jax.__version__}, JAX {jax.__version__}, on {mesh.size} of {len(devices)} × "
            f"{devices[0].device_kind}" + (f": mesh {described(mesh.shape)}" if mesh.size > 1 else ""),
            f"clips     {config.data.frames} × {config.data.height} × {config.data.width} at {config.data.fps:g} frames"
            f" a second from {config.data.source}; latents {' × '.join(map(str, shape))}",
        ]
        if config.tokenizer_from:
            lines.append(f"tokenizer of {config.tokenizer_from}")
        if config.low_res_from:
            lines.append(f"low-resolution latents of the tokenizer of {config.low_res_from}")
        for name in config.trained_stages:
            stage = config.stages[name]
            params, _ = jax.eval_shape(self._task(name).init, jax.random.key(0))
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            lines.append(
                f"stage     {name}: {stage.task}, {size:,} parameters, {stage.steps:,} steps of {stage.batch_size} "
                + (f"packs of {stage.pack.tokens} tokens" if stage.pack else "clips")
            )
            if stage.caches:
                count, size = self.data.to_encode(name)
                lines.append(
                    f"          its {count:,} clips are encoded first: {size / 1e9:.2g} GB of latents in "
                    f"{latents_path(self.workdir, name)}"
                )
            elif stage.latents:
                lines.append(f"          its clips are the latents of {stage.latents}")
        return "\n".join([*lines, f"workdir   {self.workdir}"])

    def peak(self) -> Peak | None:
        """What MFU is a fraction of; None where that is not known."""
        stated, kind = self.config.peak_flops_per_second, self.mesh.devices.flat[0].device_kind
        if stated:
            return Peak(stated, "config.peak_flops_per_second")
        found = hardware.peak(kind)
        return None if found is None else Peak(found, f"{kind}, dense bfloat16, as its maker states")

    def train(self, profile: Steps | None = None, clock: Clock | None = None) -> None:
        """Runs every stage to its end; stages that are done are skipped.

        Args:
            profile: steps of each stage to trace, see `run_stage`.
            clock: where the time is accounted for.
        """
        names = list(self.config.stages)
        initial = self._initial()  # for each task, what its last stage has trained
        tokenizer = self._taken_tokenizer() if self.config.tokenizer_from else None
        # All look before the first process writes it.
        if self._lora_stage and any(exchanged(not _holds(self.workdir / BASE))):
            base = self._base()
            self._keep_run(base, base._restored("denoiser")[0], self.workdir / BASE, CAPTIONS)
        if self.config.low_res_from and any(exchanged(not _holds(self.workdir / LOW_RES))):
            base = self._base_run()
            stage = None if base.config.takes_autoencoder else base.trained_tokenizer()[0]
            self._keep_run(base, stage, self.workdir / LOW_RES)
        for name in self.config.trained_stages:
            index, stage = names.index(name), self.config.stages[name]
            key = jax.random.fold_in(jax.random.key(self.config.seed), index)
            dataset = functools.partial(self.data.batches, name)
            extras: dict[str, Any] = {"initial": initial.get(stage.task), "later_stages": tuple(names[index + 1 :])}
            extras |= {"gone": self.data.gone, "peak": self.peak(), "profile": profile, "clock": clock}
            images = self.config.makes_images(name)
            if stage.task == "tokenizer":
                if not images:
                    extras["finish"] = self._statistics
                if self.config.tokenizer.block_transform and extras["initial"] is None:
                    extras["fit"] = functools.partial(self._fit_blocks, name)
                extras["preview"] = functools.partial(self._reconstructions, images)
                extras["validation"] = functools.partial(self._tokenizer_validation, images)
            else:
                extras["frozen"] = Frozen(tokenizer, self._base_params) if stage.lora else tokenizer
                extras["preview"] = functools.partial(self._samples, name, tokenizer)
                extras["validation"] = functools.partial(self._denoiser_validation, name, tokenizer)
                if not stage.encodes:
                    dataset = functools.partial(self.data.encoded, name, tokenizer)
                elif stage.pack:
                    dataset = functools.partial(self.data.packs, name, tokenizer)
            trained = run_stage(
                name, stage, self._task(name), dataset, self.workdir, key, self.mesh, rules=self.config.rules, **extras
            )
            initial[stage.task] = trained.served
            if stage.lora is not None:
                pairs = jax.tree.map(fetched, trained.served)
                lora_files.write(self.workdir / lora_files.FILE, pairs, stage.lora)
            if images:
                initial[stage.task] = inflate(trained.served, self.config.tokenizer, self.config.inflation)
            elif stage.task == "tokenizer":
                tokenizer = self._trained_tokenizer(trained)

    def tokenizer(self) -> TrainedTokenizer:
        """The trained tokenizer.

        Raises:
            UserError: if no stage of it is done, or the workdir's checkpoints are of another config.
        """
        return self._taken_tokenizer() if self.config.tokenizer_from else self.trained_tokenizer()[1]

    def generator(self) -> Generator:
        """The trained models; the published ones if nothing is trained yet.

        Raises:
            UserError: if the config has no denoiser, a stage has not been trained, or the workdir's checkpoints are of
                another config.
        """
        if self.config.denoiser is None:
            raise UserError("This config trains only a tokenizer, which can't sample; use --mode=reconstruct.")
        stage = None
        if only_published(self.config, self.workdir):
            params = lora_files.with_loras(self._published(), self.loras)
        else:
            stage, params = self.trained_denoiser()
        return self._generator(stage, params, self.tokenizer())

    def identity(self) -> str:
        """Tells the trained models from those of other steps and runs."""
        stages = {name: saved_steps(self.workdir, name) for name in self.config.trained_stages}
        return f"{resolved(self.workdir)} {stages}"

    def weights_digest(self) -> str:
        """Tells the newest checkpoints from others by their content, wherever the workdir is."""
        folders = [self.workdir, *(self.workdir / name for name in (TOKENIZER, LOW_RES, BASE))]
        found = []
        for folder in folders:
            for stage in self.config.stages:
                for step in saved_steps(folder, stage)[-1:]:
                    manifest = folder / "checkpoints" / stage / str(step) / MANIFEST
                    found.append(manifest.read_text() if manifest.exists() else f"{resolved(manifest.parent)}")
        return digest_of(*found) if found else self.identity()

    def made_by(self) -> dict[str, Any]:
        """What videos say of the models that made them."""
        steps = {name: max(saved_steps(self.workdir, name), default=0) for name in self.config.trained_stages}
        return {"model": resolved(self.workdir).name, "checkpoints": steps}

    def trained_denoiser(self) -> tuple[str, Any]:
        """(name of the denoiser's last stage with a checkpoint, parameters of denoiser and trained text encoder)

        LoRAs are merged: the one that the stage trains, and `loras`.

        Raises:
            UserError: as `generator`.
        """
        stage, trained = self._restored("denoiser")
        return stage, lora_files.with_loras(self._whole(stage, trained.served), self.loras)

    def _whole(self, stage: str, served: Any) -> Any:
        """The denoiser's parameters, of what a stage serves: of LoRA's A and B merged with the base."""
        lora = self.config.stages[stage].lora
        return served if lora is None else together(jax.jit(merged), self._base_params, served, lora.scale)

    @property
    def _lora_stage(self) -> str | None:
        """The name of the stage that trains LoRA, if one does."""
        return next((name for name in self.config.trained_stages if self.config.stages[name].lora), None)

    def _base(self) -> "Run":
        """The run whose denoiser LoRA changes; the workdir's copy of it, where there is one.

        Raises:
            UserError: if there is none.
        """
        copy = self.workdir / BASE
        workdir = copy if _holds(copy) else folder_of(self.config.init_from, "config.init_from")
        knobs = read_config(workdir)
        if knobs is None:
            raise UserError(f"config.init_from: {workdir} holds no run; name the --workdir of the run to be changed.")
        return self._here(build(RunConfig, knobs, f"{workdir / CONFIG}: config"), workdir)

    def _check_base(self) -> None:
        """Compares the run that LoRA changes with this config.

        Raises:
            UserError: if its denoiser, its tokenizer or its diffusion is another.
        """
        base, stage = self._base(), self._lora_stage
        if base._lora_stage:
            raise UserError(
                f"config.init_from: {base.workdir} has trained a LoRA itself; name the run that it has changed, "
                f"{base.config.init_from}."
            )
        base_stage = base._restored("denoiser")[0]
        tasks = base._task(base_stage), make_task(self.config, stage, base.text.vocab_size()).whole
        theirs, ours = (flatten_dict(unboxed(jax.eval_shape(task.init, jax.random.key(0))[0])) for task in tasks)
        same = {"config.diffusion": tasks[0].model.diffusion == tasks[1].model.diffusion}
        for path in {**theirs, **ours}:
            shapes = [None if path not in tree else tree[path].shape for tree in (theirs, ours)]
            same["/".join(path)] = shapes[0] == shapes[1] or (path[-1].startswith(TABLES) and None not in shapes)
        same["the tokenizer"] = digest(base.tokenizer()) == digest(self._taken_tokenizer())
        if not all(same.values()):
            what = next(name for name, equal in same.items() if not equal)
            raise UserError(
                f"config.init_from: {what} of {base.workdir} is another than this config's, and LoRA changes a model "
                "as it is; use that run's own config and tokenizer_from."
            )

    def _shapes_of_base(self, task: LoraTask) -> Any:
        return abstract_state(task.whole, optax.identity(), self.mesh, self.config.rules, 0.0).params

    @functools.cached_property
    def _base_params(self) -> Any:
        """Parameters of the model that LoRA changes; tables of positions are interpolated to the stage's clips."""
        served, like = self._base()._restored("denoiser")[1].served, self._shapes_of_base(self._task(self._lora_stage))
        resized = {name: resize(tree, like[name]) for name, tree in served.items()}
        return jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), resized, like)

    def _generator(self, stage: str | None, params: Any, tokenizer: TrainedTokenizer) -> Generator:
        return Generator(
            make_model(self.config, self.text.vocab_size(), stage),
            params,
            tokenizer,
            self.text.frozen() or self.text.captions(),
            self.config.sampling,
            self.low_res(),
            packed=self.config.stages[stage or self.config.denoiser_stages[-1]].pack is not None,
            call=self.config.call_frames(stage or self.config.denoiser_stages[-1]),
        )

    def _with_params(self, stage: str, tokenizer: TrainedTokenizer) -> Callable[[Any], Generator]:
        """What samples with the parameters that a denoiser stage serves."""
        generator = self._generator(stage, None, tokenizer)
        return lambda served: dataclasses.replace(generator, params=self._whole(stage, served))

    def _samples(self, stage: str, tokenizer: TrainedTokenizer) -> preview.Preview:
        """Previews of a denoiser stage."""
        return preview.samples(self._with_params(stage, tokenizer), self.data.unseen(), self.config.data.fps)

    def _denoiser_validation(self, stage: str, tokenizer: TrainedTokenizer) -> validation.Validation:
        """Measurements of a denoiser stage, on clips of the shape that it is sampled in."""
        unseen = self.data.unseen(self.config.nominal(stage))
        return validation.of_denoiser(self._with_params(stage, tokenizer), unseen, self.config.evaluation)

    def _stage_codec(self, images: bool) -> tuple[Codec, Callable[[Any], TrainedTokenizer]]:
        """A tokenizer stage's codec, and its parameters of what the stage serves; latents are not normalised yet."""
        channels = self.config.tokenizer.latent_channels
        codec = Codec(Tokenizer(self.config.tokenizer.of_images())) if images else self.codec
        return codec, lambda served: TrainedTokenizer.unnormalised(served, channels)

    def _reconstructions(self, images: bool) -> preview.Preview:
        """Previews of a tokenizer stage."""
        return preview.reconstructions(*self._stage_codec(images), self.data.unseen(), images, self.config.data.fps)

    def _tokenizer_validation(self, images: bool) -> validation.Validation:
        """Measurements of a tokenizer stage."""
        return validation.of_tokenizer(*self._stage_codec(images), self.data.unseen(), images, self.config.evaluation)

    def _initial(self, before_training: bool = False) -> dict[str, Any]:
        """For each task, what `init_from` has for its first stage; what is taken of another run is printed.

        Args:
            before_training: whether there is no vocabulary yet; only checks, prints nothing.

        Raises:
            UserError: if it can't be read, or nothing of it fits.
        """
        if self.config.starts_from_file:
            return {"denoiser": self._published()}
        firsts = {}
        for name in reversed(self.config.trained_stages):
            firsts[self.config.stages[name].task] = name
        # Once a stage has begun, the other run is not needed any more.
        firsts = {task: name for task, name in firsts.items() if not saved_steps(self.workdir, name)}
        firsts = {task: name for task, name in firsts.items() if not self.config.stages[name].lora}
        if not self.config.init_from or not firsts:
            return {}
        source = folder_of(self.config.init_from, "config.init_from")
        knobs = read_config(source)
        if knobs is None:
            raise UserError(f"config.init_from: {source} holds no run; name the --workdir of one, or a .safetensors.")
        other = self._here(build(RunConfig, knobs, f"{source / CONFIG}: config"), source)
        taken = {}
        for task_name, name in firsts.items():
            if all(other.config.stages[stage].task != task_name for stage in other.config.trained_stages):
                continue
            pieces = self.config.most_pieces if before_training else self.text.vocab_size()
            task = make_task(self.config, name, pieces if task_name == "denoiser" else 0)
            like = task.served(*map(unboxed, jax.eval_shape(task.init, jax.random.key(0))))
            other_words = before_training or not self.text.same_vocabulary(other.text)
            left_out = {"text": "of another vocabulary"} if other_words else {}
            taken[task_name] = take(other._restored(task_name)[1].served, like, source, left_out)
        if all(found.fraction < LEAST for found in taken.values()):
            why = "; ".join(sentence for found in taken.values() for sentence in found.sentences)
            raise UserError(
                f"config.init_from: there is nothing to start from ({why or f'{source} trains other models'}); name "
                "another run, or leave it out."
            )
        if not before_training:
            for task_name, found in taken.items():
                print(f"the {task_name} starts from {'; '.join(found.sentences)}", flush=True)
        return {task_name: found.params for task_name, found in taken.items()}

    def _published(self) -> dict[str, Any]:
        """The denoiser's parameters in the file that `init_from` names.

        Raises:
            UserError: if it does not fit the config.
        """
        model = make_model(self.config, self.config.most_pieces, self.config.denoiser_stages[0])
        like = unboxed(jax.eval_shape(model.init, jax.random.key(0)))["denoiser"]
        return {
            "denoiser": published_weights.load(self.config.init_from, self.config.denoiser, like, self.config.tubelets)
        }

    def _task(self, stage: str) -> Task:
        """The task of a stage."""
        trains_text = self.config.stages[stage].task == "denoiser"
        return make_task(self.config, stage, self.text.vocab_size() if trains_text else 0)

    def trained_tokenizer(self) -> tuple[str, TrainedTokenizer]:
        """(name of the tokenizer's last stage that is done, its tokenizer)

        Raises:
            UserError: as `tokenizer`.
        """
        stage, trained = self._restored("tokenizer")
        return stage, self._trained_tokenizer(trained)

    def _restored(self, task_name: str) -> tuple[str, Trained]:
        """(name of the task's last stage that has a checkpoint, what its newest checkpoint serves)"""
        for name, stage in reversed(self.config.stages.items()):
            directory = self.workdir / "checkpoints" / name
            if stage.task != task_name or self.config.makes_images(name) or not directory.is_dir():
                continue
            checkpoints = Checkpoints(directory, writer=False)
            if checkpoints.steps():
                trained = self._served(name, checkpoints)
                if task_name == "denoiser" or trained.outcome:
                    return name, trained
        raise UserError(f"{self.workdir} has no trained {task_name} yet; train first, with --mode=train.")

    def _served(self, stage: str, checkpoints: Checkpoints) -> Trained:
        """What the newest checkpoint of a stage serves: its average, or its parameters where none is kept."""
        task = self._task(stage)
        like = abstract_state(task, optax.identity(), self.mesh, self.config.rules, self.config.stages[stage].ema_decay)
        if like.ema is not None:
            return Trained(*checkpoints.restore_part("ema", like.ema))
        weights, outcome = checkpoints.restore_part("weights", {"params": like.params, "moving": like.moving})
        return Trained(task.served(**weights), outcome)

    def make_vocabulary(self) -> bytes | None:
        """The vocabulary or the class labels, see `RunText.make`; None without a denoiser."""
        if self.config.denoiser is None:
            return None
        if self._lora_stage:
            return self.text.take(self._base().text, self.data.of_nominal_size().captions)
        return self.text.make(self.data.of_nominal_size().captions, self.data.unseen().captions)

    def _statistics(self, served: Any) -> dict:
        """Mean and standard deviation of the latents, which normalise them for the denoiser."""
        raw = TrainedTokenizer.unnormalised(served, self.config.tokenizer.latent_channels)
        return latent_statistics(
            lambda video: together(self.codec.encode, raw, video)[0], self._some_batches(), STATISTICS_CLIPS
        )

    def _fit_blocks(self, stage: str, params: Any) -> Any:
        """Parameters of a tokenizer stage whose block transform is fitted to training clips."""
        batches = itertools.islice(self._some_batches(), BLOCK_CLIPS // STATISTICS_BATCH)
        return self._task(stage).fit(params, np.concatenate([batch["video"] for batch in batches]))

    def _some_batches(self) -> Batches:
        """Training clips of the data's own shape, in an order different from the stages'."""
        seed = self.config.seed + len(self.config.stages)
        return Batches(Clips(self.data.of_nominal_size(), seed), (STATISTICS_BATCH,))

    def _trained_tokenizer(self, trained: Trained) -> TrainedTokenizer:
        """On all devices: clips are also encoded in a thread, where programs must not wait for each other's devices."""
        served = jax.device_put(trained.served, replicated(self.mesh))
        if not self.config.normalise_latents:
            return TrainedTokenizer.unnormalised(served, self.config.tokenizer.latent_channels)
        channels = (np.asarray(trained.outcome[name], np.float32) for name in ("latent_mean", "latent_std"))
        return TrainedTokenizer(served, *jax.device_put(tuple(channels), replicated(self.mesh)))

    def encode(
        self, out: epath.PathLike, tokenizer: TrainedTokenizer, clips: int = 0, stage: str | None = None
    ) -> dict[str, Any]:
        """Encodes the training clips of a stage, in the stage's shapes, into a data set.

        Args:
            out: the folder of the data set, see `data.latents`.
            tokenizer: this run's, or another run's.
            clips: how many, in the stage's order, with new windows and crops in each epoch; 0 is each clip once.
            stage: its name; None is the last stage.

        Returns:
            What `encode.json` holds.

        Raises:
            UserError: if there is no such stage, the folder holds something else, or nothing can be encoded.
        """
        names = list(self.config.stages)
        if stage is not None and stage not in names:
            raise UserError(f"--stage={stage} is not a stage of the config; choose {' or '.join(names)}.")
        return self.data.encode(out, stage or names[-1], clips, tokenizer)

    def _other_run(self) -> "Run":
        """The run that `tokenizer_from` names; the workdir's copy of it, or that run's own copy, where there is one."""
        if _holds(self.workdir / TOKENIZER):
            return self.run_in(self.workdir / TOKENIZER)
        other = folder_of(self.config.tokenizer_from, "config.tokenizer_from")
        return self.run_in(other / TOKENIZER if _holds(other / TOKENIZER) else other)

    def run_in(self, workdir: pathlib.Path) -> "Run":
        """The run in another workdir, checked to have a tokenizer with this config's knobs.

        Raises:
            UserError: if there is none, or its tokenizer has other knobs.
        """
        knobs = read_config(workdir)
        if knobs is None:
            raise UserError(f"{workdir} holds no run to take a tokenizer from; name the --workdir of one.")
        config = build(RunConfig, knobs, f"{workdir / CONFIG}: config")
        ours, theirs = (dataclasses.asdict(c.tokenizer) for c in (self.config, config))
        for knob, value in ours.items():
            if theirs[knob] != value and knob != "remat":  # which does not change the weights
                raise UserError(
                    f"config.tokenizer.{knob} is {value!r}, but {theirs[knob]!r} in {workdir}, whose tokenizer is "
                    f"used; set it to {theirs[knob]!r}."
                )
        return self._here(dataclasses.replace(config, normalise_latents=self.config.normalise_latents), workdir)

    def _here(self, config: RunConfig, workdir: pathlib.Path) -> "Run":
        """Another run on this one's mesh."""
        return Run(dataclasses.replace(config, mesh=self.config.mesh, rules=self.config.rules), workdir)

    def _taken_tokenizer(self) -> TrainedTokenizer:
        """The tokenizer that `tokenizer_from` names; the workdir gets a copy, so that it does not need that run."""
        if self.config.takes_autoencoder:
            _, params = read_autoencoder(self.config.tokenizer_from)
            return TrainedTokenizer.unnormalised({"params": params}, self.config.tokenizer.latent_channels)
        other = self._other_run()
        stage, tokenizer = other.trained_tokenizer()
        self._keep_run(other, stage, self.workdir / TOKENIZER)
        return tokenizer

    def low_res(self) -> LowRes | None:
        """The tokenizer of the base run, where this run's denoiser upscales.

        Raises:
            UserError: if the base run has none yet, or its latents have another shape than the denoiser reads.
        """
        if not self.config.low_res_from or self._low_res is not None:
            return self._low_res
        base, scale = self._base_run(), self.config.denoiser.upscale
        for name in self.config.denoiser_stages:
            for shape in (*self.config.clip_shapes(name), self.config.nominal(name)):
                for height, width in shape.sizes():
                    self._check_low_res(base, (shape.frames, height, width), scale)
        self._low_res = LowRes(base.codec, base.tokenizer(), scale)
        return self._low_res

    def _check_low_res(self, base: "Run", clip: tuple[int, int, int], scale: int) -> None:
        t, h, w, c = self.config.tokenizer.latent_shape(*clip)
        wanted, small = (t, h // scale, w // scale, c), (clip[0], clip[1] // scale, clip[2] // scale)
        try:
            found = base.config.tokenizer.latent_shape(*small)
        except ValueError as error:
            found = str(error)
        if found != wanted:
            raise UserError(
                f"config.low_res_from: the tokenizer of {base.workdir} makes latents of {found} of {small} pixels; the "
                f"denoiser reads {wanted}: name a run whose tokenizer has the strides and latent_channels of this one."
            )

    def _base_run(self) -> "Run":
        """The base run of super-resolution; the workdir's copy of it, where there is one.

        Raises:
            UserError: if there is none.
        """
        copy = self.workdir / LOW_RES
        workdir = copy if _holds(copy) else folder_of(self.config.low_res_from, "config.low_res_from")
        knobs = read_config(workdir)
        if knobs is None:
            raise UserError(f"config.low_res_from: {workdir} holds no run; name the --workdir of the base run.")
        base = self._here(build(RunConfig, knobs, f"{workdir / CONFIG}: config"), workdir)
        takes_another = base.config.tokenizer_from and not base.config.takes_autoencoder
        return base._other_run() if takes_another else base

    def _keep_run(self, other: "Run", stage: str | None, copy: pathlib.Path, files: Sequence[str] = ()) -> None:
        """Copies another run's model into the workdir: its average and statistics, no optimizer state.

        `stage` is the one that trained it; None where that run uses a published autoencoder. `files` are copied too,
        where there are any.
        """
        if other.workdir == copy or not self.workdir.exists() or not is_first():
            return
        remove_folder(copy)  # what a killed process left
        if stage is not None:
            for step in saved_steps(other.workdir, stage):
                place = pathlib.Path("checkpoints", stage, str(step))
                copy_folder(other.workdir / place, copy / place, _not_served)
        for name in files:
            if (other.workdir / name).exists():
                write_atomically(copy / name, (other.workdir / name).read_bytes())
        write_atomically(copy / CONFIG, json.dumps(dataclasses.asdict(other.config), indent=1) + "\n")


def _holds(copy: pathlib.Path) -> bool:
    """Whether a copy of another run is complete: its config is written last."""
    return (copy / CONFIG).exists()


def _not_served(names: Sequence[str]) -> list[str]:
    """Names in a checkpoint that a trained model does not need."""
    return ["state", *(["weights"] if "ema" in names else [])]
