"""What a config is made of and what it costs, from shapes only: nothing is allocated, no data is read."""

import collections
import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from walt_jax.generation.codec import Codec
from walt_jax.generation.latent_diffusion import LatentDiffusion, unboxed
from walt_jax.parallel.cost import flops, flops_by_module, module_of
from walt_jax.text.vocabulary import PAD
from walt_jax.tokenizer.autoencoder import Tokenizer
from walt_jax.training.loop import StageConfig
from walt_jax.training.lora_task import Frozen, LoraTask
from walt_jax.training.programs import batch_of, tokenizer_shapes
from walt_jax.training.run_config import RunConfig, make_model, make_task
from walt_jax.training.tasks import Task


def plan(config: RunConfig) -> dict[str, Any]:
    """Counts a config's parameters and floating-point operations.

    Returns:
        `params` {"tokenizer", "text_encoder", "denoiser"}; `forward_flops_per_clip` of the same, of one clip of the
        data's shape once through (a multiplication and an addition are two); `train_flops_per_step` of the last stage,
        with everything that is recomputed or run frozen; `stages`, see `_stage`; `modules`, parameters and forward
        operations by module; `protocol`, what is counted; `config`, all of its knobs.
    """
    key = jax.random.key(0)
    clip = config.clip_shape().nominal
    video = jax.ShapeDtypeStruct((1, *clip, 3), jnp.float32)
    tokenizer = Tokenizer(config.tokenizer)
    variables = {"tokenizer": unboxed(jax.eval_shape(tokenizer.init, key, video))}
    costs = {"tokenizer": flops_by_module(tokenizer.apply, variables["tokenizer"], video)}
    if config.denoiser is not None:
        model = make_model(config, config.most_pieces)
        params = unboxed(jax.eval_shape(model.init, key))
        variables["denoiser"] = params["denoiser"]
        costs["denoiser"] = denoiser_flops(model, params, config.text_length)
        if config.text is not None:
            ids = jax.ShapeDtypeStruct((1, config.text.length), jnp.int32)
            text = unboxed(jax.eval_shape(model.text.init, key, ids, ids))["params"]
            variables["text_encoder"] = text
            costs["text_encoder"] = flops_by_module(
                lambda params, ids: model.text.apply({"params": params}, ids, ids != PAD), text, ids
            )
    stages = {name: _stage(config, name, stage) for name, stage in config.stages.items()}
    return {
        "params": {name: _size(tree) for name, tree in variables.items()},
        "forward_flops_per_clip": {name: sum(cost.values()) for name, cost in costs.items()},
        "train_flops_per_step": list(stages.values())[-1]["train_flops_per_step"],
        "stages": stages,
        "modules": {name: _modules(_sizes(tree), costs[name]) for name, tree in variables.items()},
        "protocol": (
            f"matrix products and convolutions only, a multiplication with its addition counted as two; a clip is "
            f"{clip[0]} frames of {clip[1]} × {clip[2]} pixels, once through each model: encoded and decoded, denoised "
            "once, its caption read once. A training step: forward and backward, with self-conditioning's first pass"
        ),
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }


def _modules(sizes: dict[str, int], costs: dict[str, int]) -> dict[str, dict[str, int]]:
    """Both of each module that has either."""
    names = dict.fromkeys([*sizes, *costs])
    return {name: {"params": sizes.get(name, 0), "forward_flops_per_clip": costs.get(name, 0)} for name in names}


def denoiser_flops(model: LatentDiffusion, params: Any, text_tokens: int) -> dict[str, int]:
    """Of one pass over one clip with a caption of so many tokens, by module."""

    def inputs():
        noisy, mask = (model.tokens(jnp.zeros((1, *model.latent_shape[:3], c))) for c in (model.latent_shape[3], 1))
        time = jnp.zeros((1, 1))
        encoder = {name: tree for name, tree in params.items() if name == "text"}
        encoder = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), encoder)
        return (
            noisy,
            time,
            model.condition(
                encoder, model.text_tokens(1, 1, text_tokens), noisy, mask, jnp.zeros((1, *model.low_res_shape)), time
            ),
        )

    def forward(params, inputs):
        return model.denoiser.apply({"params": params}, *inputs, model.layout)

    return flops_by_module(forward, params["denoiser"], jax.eval_shape(inputs))


def _stage(config: RunConfig, name: str, stage: StageConfig) -> dict[str, int]:
    """What a stage costs; of several shapes of batches the mean.

    Returns:
        "params" and "train_flops_per_step"; of a denoiser's also "encoding_flops_per_step", which is what encoding the
        clips of a batch takes: part of the step where `cached_clips` is 0, and otherwise done once, before the first
        step; and "latents_bytes_per_clip", float32 on disk, without embeddings of captions.
    """
    task = make_task(config, name, config.most_pieces)
    params, moving = map(unboxed, jax.eval_shape(task.init, jax.random.key(0)))
    shapes, sizes = config.clip_shapes(name), config.batch_sizes(name)
    weights = [shape.weight for shape in shapes]
    encoding = None
    if stage.pack is None:
        steps = [
            _gradients(config, task, params, moving, shape.nominal, size, name)
            for shape, size in zip(shapes, sizes, strict=True)
        ]
        # Weights count clips: a shape whose batches are larger has fewer of them.
        weights = [weight / size for weight, size in zip(weights, sizes, strict=True)]
        cost = sum(weight * step for weight, step in zip(weights, steps, strict=True)) / sum(weights)
        if stage.task == "denoiser":
            encodings = [size * _encoding(config, shape.nominal) for shape, size in zip(shapes, sizes, strict=True)]
            encoding = sum(weight * each for weight, each in zip(weights, encodings, strict=True)) / sum(weights)
    else:
        # Of a token, in clips of the pack's shapes one by one; a pack's padding costs as much.
        steps, encodings, tokens = [], [], []
        for shape in shapes:
            clip = shape.nominal
            latents = config.tokenizer.latent_shape(*clip)
            whole = task.whole if isinstance(task, LoraTask) else task
            single = dataclasses.replace(whole, model=_of_shape(whole.model, latents))
            single = single if whole is task else dataclasses.replace(task, whole=single)
            own = unboxed(jax.eval_shape(single.init, jax.random.key(0)))  # tables have the windows' sizes
            steps.append(_gradients(config, single, *own, clip, 1, name))
            encodings.append(_encoding(config, clip))
            tokens.append(math.prod(config.denoiser.grid(latents[:3])))
        total = sum(weight * count for weight, count in zip(weights, tokens, strict=True))
        packs = stage.pack.tokens * stage.batch_size / total
        cost = packs * sum(weight * step for weight, step in zip(weights, steps, strict=True))
        encoding = packs * sum(weight * each for weight, each in zip(weights, encodings, strict=True))
    counts = {"params": _size(params), "train_flops_per_step": round(cost)}
    if encoding is not None:
        if stage.encodes:
            counts["train_flops_per_step"] += round(encoding)
        counts |= {
            "encoding_flops_per_step": round(encoding),
            "latents_bytes_per_clip": round(config.latents_bytes(name)),
        }
    return counts


def _encoding(config: RunConfig, clip: tuple[int, int, int]) -> int:
    """Operations of encoding one clip; for super-resolution also at low resolution, with a tokenizer of equal shape."""
    codec, frozen = Codec(Tokenizer(config.tokenizer)), tokenizer_shapes(config)
    scales = {1, config.denoiser.upscale}
    videos = [jax.ShapeDtypeStruct((1, clip[0], clip[1] // s, clip[2] // s, 3), jnp.uint8) for s in scales]
    return sum(flops(lambda frozen, video: codec.encode(frozen, video)[0], frozen, video) for video in videos)


def _of_shape(model: LatentDiffusion, latents: tuple[int, int, int, int]) -> LatentDiffusion:
    """The model for clips of one shape, with windows that divide them: each size the next one that does."""
    config, grid = model.denoiser.config, model.denoiser.config.grid(latents[:3])
    windows = tuple(
        tuple(
            size and next(s for s in range(min(size, axis), axis + 1) if axis % s == 0)
            for size, axis in zip(w, grid, strict=True)
        )
        for w in config.windows
    )
    denoiser = model.denoiser.clone(config=dataclasses.replace(config, windows=windows))
    return dataclasses.replace(model, denoiser=denoiser, latent_shape=latents)


def _gradients(
    config: RunConfig,
    task: Task,
    params: Any,
    moving: Any,
    clip: tuple[int, int, int],
    batch_size: int,
    stage: str,
) -> int:
    """Operations of one step's gradients on clips of one shape; a denoiser's are on their latents."""
    batch = batch_of(config, stage, clip, batch_size, encodes=False)
    frozen = tokenizer_shapes(config) if config.stages[stage].task == "denoiser" else None
    if isinstance(task, LoraTask):
        base = unboxed(jax.eval_shape(task.whole.init, jax.random.key(0))[0])
        frozen = Frozen(frozen, base)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return flops(task.gradients, params, moving, frozen, batch, jax.eval_shape(jax.random.key, 0), step)


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _sizes(tree: Any) -> dict[str, int]:
    """Parameters by module, named as `cost.module_of` names them."""
    sizes: dict[str, int] = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(entry.key) for entry in path if str(entry.key) not in ("params", "codebook")]
        sizes[module_of("/".join(names[:-1]))] += math.prod(leaf.shape)
    return sizes
