"""The programs that a config runs on a mesh, as functions of shapes with shardings: to be compiled or analysed."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import single_clips, unboxed
from walt_jax.layers import compiling_for
from walt_jax.parallel.memory import device_bytes, tree_bytes
from walt_jax.parallel.mesh import batch_shardings, check_rows, data_shards, replicated
from walt_jax.parallel.rules import active_rules
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.training.accumulation import accumulated_gradients
from walt_jax.training.lora_task import Frozen, LoraTask
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.plan_packs import pack_batch
from walt_jax.training.run_config import RunConfig, make_model, make_task
from walt_jax.training.state import abstract_state, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what it is called with.

    Attributes:
        name: "train_step", "sampler_step", "tokenizer_train_step" or "decode".
        stage: whose step it is, if one's.
        jitted: the program; not traced yet.
        arguments: shapes with shardings.
        memory: {kind: bytes a device} of the arguments.
        clips: that it works on.
        clip: their (frames, height, width).
        tokens: latent tokens of all clips; latent positions of a tokenizer's.
        own: a function and its arguments that do the program's operations, but for the optimizer's.
        batch_arguments: which of those arguments have a row for each clip.
        parameter_bytes: of all parameters, on all devices together.
        compute_bytes: of a number in the computation.
        passes: through the parameters, forward and backward.
        residual_bytes: of all blocks' residual streams, of all clips.
    """

    name: str
    stage: str | None
    jitted: Any
    arguments: tuple[Any, ...]
    memory: dict[str, int]
    clips: int
    clip: tuple[int, int, int]
    tokens: int
    own: tuple[Callable[..., Any], tuple[Any, ...]]
    batch_arguments: tuple[int, ...]
    parameter_bytes: int
    compute_bytes: int
    passes: int
    residual_bytes: int = 0

    @property
    def trains(self) -> bool:
        return "train" in self.name


def programs(config: RunConfig, mesh: Mesh) -> dict[str, Callable[[], Program]]:
    """What makes each of a config's programs, by name; trace it within `tracing`."""
    made: dict[str, Callable[[], Program]] = {}
    if config.denoiser is not None:
        made["train_step"] = functools.partial(train_step, config, config.denoiser_stages[-1], mesh)
        made["sampler_step"] = functools.partial(sampler_step, config, mesh)
    tokenizers = [name for name in config.trained_stages if config.stages[name].task == "tokenizer"]
    if tokenizers:
        made["tokenizer_train_step"] = functools.partial(train_step, config, tokenizers[-1], mesh)
    if not config.takes_autoencoder:
        made["decode"] = functools.partial(decode, config, mesh)
    return made


def tracing(config: RunConfig, mesh: Mesh) -> contextlib.ExitStack:
    """Within, programs are traced for the mesh's devices, which need not be attached; nothing is computed."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
    stack.enter_context(active_rules(config.rules))
    stack.enter_context(compiling_for(mesh.devices.flat[0].platform))
    return stack


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def batch_of(config: RunConfig, stage: str, clip: tuple[int, int, int], size: int, encodes: bool) -> dict[str, Any]:
    """Shapes of a batch of `size` clips: pixels for the tokenizer, latents for the denoiser unless it `encodes`."""
    batch = {"video": jax.ShapeDtypeStruct((size, *clip, 3), jnp.uint8)}
    if config.stages[stage].task == "tokenizer":
        return batch
    model, shape = make_model(config, config.most_pieces, stage), config.tokenizer.latent_shape(*clip)
    if not encodes:
        batch = {"latents": jax.ShapeDtypeStruct((size, *shape), jnp.float32)}
    batch["text"] = jax.eval_shape(lambda: model.text_tokens(size, config.text_length))
    if (scale := config.denoiser.upscale) > 1:
        t, h, w, c = shape
        batch["low_res"] = jax.ShapeDtypeStruct((size, t, h // scale, w // scale, c), jnp.float32)
    return batch


def tokenizer_shapes(config: RunConfig) -> TrainedTokenizer:
    """Shapes of a trained tokenizer."""
    channels = jax.ShapeDtypeStruct((config.tokenizer.latent_channels,), jnp.float32)
    video = jax.ShapeDtypeStruct((1, 1, *config.tokenizer.strides[1:], 3), jnp.float32)
    variables = jax.eval_shape(Tokenizer(config.tokenizer).init, jax.random.key(0), video)
    return TrainedTokenizer(unboxed(variables), channels, channels)


def largest(config: RunConfig, stage: str) -> tuple[tuple[int, int, int], int]:
    """(frames, height, width) and number of the clips of a stage's largest batch."""
    shapes = zip(config.clip_shapes(stage), config.batch_sizes(stage), strict=True)
    shape, size = max(shapes, key=lambda each: math.prod(each[0].nominal) * each[1])
    return shape.nominal, size


class _Batch(NamedTuple):
    """What a train step works on: shapes with shardings, rows, clips, (frames, height, width) of one, tokens."""

    arrays: dict[str, Any]
    rows: int
    clips: int
    clip: tuple[int, int, int]
    tokens: int


def _batch(config: RunConfig, name: str, mesh: Mesh) -> _Batch:
    """A stage's largest batch, or its packs.

    Raises:
        UserError: if the mesh does not divide it.
    """
    stage = config.stages[name]
    if stage.pack is not None:
        check_rows(f"A micro-batch of stage {name}", stage.batch_size // stage.accumulate, mesh)
        batch, clips, tokens = pack_batch(config, name, data_shards(mesh) * stage.accumulate)
        placed = _placed(batch, batch_shardings(batch, mesh))
        return _Batch(placed, stage.batch_size, round(clips), config.clip_shape().nominal, round(tokens))
    clip, size = largest(config, name)
    check_rows(f"A micro-batch of stage {name}", size // stage.accumulate, mesh)
    batch = batch_of(config, name, clip, size, stage.encodes)
    grid = config.tokenizer.latent_shape(*clip)[:3]
    grid = config.denoiser.grid(grid) if stage.task == "denoiser" else grid
    return _Batch(_placed(batch, batch_shardings(batch, mesh)), size, size, clip, size * math.prod(grid))


def train_step(config: RunConfig, name: str, mesh: Mesh) -> Program:
    """A stage's train step on its largest batch, or on its packs; packs' clips are encoded before the step.

    Raises:
        UserError: if the mesh does not divide it.
    """
    stage, task = config.stages[name], make_task(config, name, config.most_pieces)
    found = _batch(config, name, mesh)
    boxed, _ = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(stage.optimizer, stage.steps, boxed)
    state = abstract_state(task, optimizer, mesh, config.rules, stage.ema_decay)
    frozen = _everywhere(tokenizer_shapes(config), mesh) if stage.encodes and stage.pack is None else None
    if stage.lora is not None:
        whole = abstract_state(task.whole, optax.identity(), mesh, config.rules, 0.0)
        frozen = Frozen(frozen, whole.params)
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    divided = state_shardings(state)
    platform = mesh.devices.flat[0].platform
    jitted = make_train_step(task, optimizer, stage.ema_decay, platform, divided, stage.accumulate)
    memory = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "average": device_bytes(state.ema),
        "batch": device_bytes(found.arrays),
        "frozen": device_bytes(frozen),
    }
    denoises = stage.task == "denoiser"
    dtype = config.denoiser.dtype if denoises else config.tokenizer.dtype
    return Program(
        name="train_step" if denoises else "tokenizer_train_step",
        stage=name,
        jitted=jitted,
        arguments=(state, frozen, found.arrays, key),
        memory=memory,
        clips=found.clips,
        clip=found.clip,
        tokens=found.tokens,
        batch_arguments=(3,),
        parameter_bytes=tree_bytes(state.params),
        compute_bytes=jnp.dtype(dtype).itemsize,
        **_gradients(config, name, found, (state.params, state.moving, frozen, found.arrays, key, state.step)),
    )


def _gradients(config: RunConfig, name: str, batch: _Batch, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Of a train step what depends on remat and micro-batches: `own`, `passes` and `residual_bytes`."""
    stage, task = config.stages[name], make_task(config, name, config.most_pieces)
    residual, passes = 0, 2
    if stage.task == "denoiser":
        tokens = batch.tokens if stage.pack is None else stage.pack.tokens * stage.batch_size
        residual = _residual_bytes(config, tokens // stage.accumulate)
        passes = 3 if config.denoiser.self_conditioning else 2
    own = functools.partial(accumulated_gradients, task, stage.accumulate), arguments
    return {"own": own, "passes": passes * stage.accumulate, "residual_bytes": residual}


def changed(program: Program, config: RunConfig, mesh: Mesh) -> Program:
    """A train step with the remat policy and the micro-batches of another config, to be analysed, not compiled.

    Raises:
        UserError: if the mesh does not divide the micro-batches.
    """
    found, arguments = _batch(config, program.stage, mesh), list(program.own[1])
    arguments[program.batch_arguments[0]] = found.arrays
    return dataclasses.replace(program, **_gradients(config, program.stage, found, tuple(arguments)))


def _residual_bytes(config: RunConfig, tokens: int) -> int:
    """Of all blocks' residual streams."""
    denoiser = config.denoiser
    return tokens * denoiser.dim * denoiser.layers * jnp.dtype(denoiser.dtype).itemsize


def _clips(config: RunConfig, mesh: Mesh) -> int:
    """Clips that are sampled together, as many as each data shard can have alike."""
    count = config.sampling.batch_size if config.sampling is not None else 1
    return -(-count // data_shards(mesh)) * data_shards(mesh)


def sampler_step(config: RunConfig, mesh: Mesh) -> Program:
    """One evaluation of the denoiser in sampling; with guidance also without the condition."""
    model, count, clip = make_model(config, config.most_pieces), _clips(config, mesh), config.clip_shape().nominal
    task = make_task(config, config.denoiser_stages[-1], config.most_pieces)
    task = task.whole if isinstance(task, LoraTask) else task
    params = abstract_state(task, optax.identity(), mesh, config.rules, 0.0).params

    def step(params, noisy, text_tokens, time):
        rows, zeros = len(noisy), jnp.zeros_like(noisy)
        mask = model.tokens(jnp.zeros((rows, *model.latent_shape[:3], 1)))
        low_res, times = jnp.zeros((rows, *model.low_res_shape)), jnp.full((rows, 1), time)
        outputs = []
        for text in (text_tokens, jax.tree.map(jnp.zeros_like, text_tokens))[: 1 + guided]:
            condition = model.condition(params, single_clips(text), zeros, mask, low_res, times)
            outputs.append(model.denoise(params, condition, model.layout)(noisy, times, zeros))
        return sum(outputs)

    guided = config.sampling.guidance.needs_unconditional
    noisy = jax.eval_shape(lambda: model.tokens(jnp.zeros((count, *model.latent_shape))))
    batch = {"noisy": noisy, "text": jax.eval_shape(lambda: model.text_tokens(count, config.text_length))}
    batch = _placed(batch, batch_shardings(batch, mesh))
    time = _everywhere(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    arguments = (params, batch["noisy"], batch["text"], time)
    memory = {"parameters": device_bytes(params), "batch": device_bytes(batch)}
    tokens = count * config.tokens(clip)
    return Program(
        name="sampler_step",
        stage=None,
        jitted=jax.jit(step),
        arguments=arguments,
        memory=memory,
        clips=count,
        clip=clip,
        tokens=tokens,
        own=(step, arguments),
        batch_arguments=(1, 2),
        parameter_bytes=tree_bytes(params),
        compute_bytes=jnp.dtype(config.denoiser.dtype).itemsize,
        passes=1 + guided,
        residual_bytes=_residual_bytes(config, tokens),
    )


def decode(config: RunConfig, mesh: Mesh) -> Program:
    """Decoding the clips that are sampled together; all devices have the whole tokenizer."""
    count, clip = _clips(config, mesh), config.clip_shape().nominal
    codec, shape = Codec(Tokenizer(config.tokenizer)), config.tokenizer.latent_shape(*clip)
    frozen = _everywhere(tokenizer_shapes(config), mesh)
    batch = {"latents": jax.ShapeDtypeStruct((count, *shape), jnp.float32)}
    batch = _placed(batch, batch_shardings(batch, mesh))

    def run(frozen, latents):
        return codec.decode(frozen, latents)[0]

    arguments = (frozen, batch["latents"])
    memory = {"parameters": device_bytes(frozen), "batch": device_bytes(batch)}
    return Program(
        name="decode",
        stage=None,
        jitted=jax.jit(run),
        arguments=arguments,
        memory=memory,
        clips=count,
        clip=clip,
        tokens=count * math.prod(shape[:3]),
        own=(run, arguments),
        batch_arguments=(1,),
        parameter_bytes=tree_bytes(frozen),
        compute_bytes=jnp.dtype(config.tokenizer.dtype).itemsize,
        passes=1,
    )
