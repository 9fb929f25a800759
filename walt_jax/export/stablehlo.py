"""StableHLO programs of `jax.export`: the tokenizer in chunks and the denoiser's step, which run without this project.

Each takes the parameters first, by name as the safetensors next to it have them, so that programs stay small. The batch
is symbolic. They are traced without the kernels and workarounds of one platform, so that all run the same operations.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import export

from walt_jax.diffusion.sampler import TimeGrid
from walt_jax.errors import UserError
from walt_jax.export.contents import Contents, Manifest
from walt_jax.export.untrusted import Shapes
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion, SamplingConfig
from walt_jax.layers import ANY_PLATFORM, compiling_for
from walt_jax.text.frozen import Embedded
from walt_jax.training.run_config import RunConfig, make_model
from walt_jax.workdir import write_atomically

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS = "programs.json"
SUFFIX = ".jaxexport"
RESULTS = {"encode": ("latents", "cache"), "decode": ("video", "cache"), "step": ("latents", "estimates")}

Arguments = dict[str, Any]  # shapes and types, by name, in order


def write(folder: pathlib.Path, found: Contents, vocab_size: int) -> list[str]:
    """Writes the programs, and `programs.json`, which says what each takes and returns; returns the names of files."""
    weights = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()}
    about = {}
    with compiling_for(ANY_PLATFORM):
        for name, (program, arguments) in programs(found.manifest, vocab_size, weights).items():
            exported = export.export(jax.jit(program), platforms=PLATFORMS)(weights, *arguments.values())
            (folder / f"{name}{SUFFIX}").write_bytes(exported.serialize())
            results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
            about[name] = {
                "arguments": {"weights": "the tensors of the safetensors, by name"} | _described(arguments),
                "results": _described(dict(zip(RESULTS[name.split("_")[0]], results, strict=True))),
            }
    stated = {"jax": jax.__version__, "platforms": PLATFORMS, "programs": about}
    write_atomically(folder / PROGRAMS, json.dumps(stated, indent=1) + "\n")
    return [PROGRAMS, *(f"{name}{SUFFIX}" for name in about)]


def _described(values: dict[str, Any]) -> dict[str, Any]:
    """Shape and type of each array."""

    def one(value: Any) -> Any:
        return {"dtype": value.dtype.name, "shape": [d if isinstance(d, int) else str(d) for d in value.shape]}

    return {
        name: "as the program returns it for the next chunk" if name == "cache" else jax.tree.map(one, value)
        for name, value in values.items()
    }


def programs(manifest: Manifest, vocab_size: int, weights: Shapes) -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """(function, its arguments after the weights) by name; the batch is symbolic.

    "encode_first" and "decode_first" take a clip of the config's length, or the first chunk of a longer one;
    "encode_next" and "decode_next" the chunks after it, of as many frames as the clip without its first one.
    """
    config, codec = manifest.config, manifest.codec
    (batch,) = export.symbolic_shape("b")
    shape = (config.data.frames, config.data.height, config.data.width)
    t, *latent = config.tokenizer.latent_shape(*shape)
    sides = {
        "encode": (codec.encode, "video", jnp.uint8, shape[0], (*shape[1:], 3)),
        "decode": (codec.decode, "latents", jnp.float32, t, tuple(latent)),
    }
    found: dict[str, tuple[Callable[..., Any], Arguments]] = {}
    for name, (method, takes, dtype, length, rest) in sides.items():
        program = _of_tokenizer(method)
        first = {takes: jax.ShapeDtypeStruct((batch, length, *rest), dtype)}
        found[f"{name}_first"] = (program, first)
        _, cache = jax.eval_shape(program, weights, *first.values())
        if cache is not None and length > 1:
            later = {takes: jax.ShapeDtypeStruct((batch, length - 1, *rest), dtype), "cache": cache}
            found[f"{name}_next"] = (program, later)
    if manifest.stage:
        if config.denoiser.mean_velocity:
            raise UserError(
                "A step that is exported does not tell the denoiser where it ends, and denoiser.mean_velocity asks for "
                "that; use --format=safetensors or orbax."
            )
        guidance = config.sampling.guidance
        for knob, carries in (
            ("first_block_cache", config.sampling.first_block_cache),
            ("guidance.apg.momentum", guidance.apg is not None and guidance.apg.momentum),
        ):
            if carries:
                raise UserError(
                    f"A step that is exported carries no more than estimates: set config.sampling.{knob} to 0."
                )
        model = make_model(config, vocab_size, manifest.stage, codec)
        found["step"] = (_step(model, config.sampling), _step_arguments(model, config, batch))
    return found


def _of_tokenizer(method: Callable[..., Any]) -> Callable[..., Any]:
    """`Codec.encode` or `decode` of parameters by name."""

    def program(weights, chunk, cache=None):
        tree = unflatten_dict(weights, sep="/")
        trained = TrainedTokenizer(tree["tokenizer"], tree["latents"]["mean"], tree["latents"]["std"])
        return method(trained, chunk, cache)

    return program


def _step(model: LatentDiffusion, sampling: SamplingConfig) -> Callable[..., Any]:
    """A step of DDIM with the config's guidance, from a time to the next, both 0..1."""

    def step(weights, latents, time, next_time, text, empty, estimates, observed=None, mask=None):
        until = None if mask is None else jnp.where(mask == 1, 0.0, NEVER)
        text, empty = (Embedded(**part) if isinstance(part, dict) else part for part in (text, empty))
        params = unflatten_dict(weights, sep="/")
        free = jax.tree.map(lambda one: jnp.broadcast_to(one[None], (latents.shape[0], *one.shape)), empty)
        seeds = jnp.zeros(latents.shape[0], jnp.uint32)  # DDIM has no randomness
        asked = model.asked(text, free, seeds, latents.shape[1:], observed, until)
        predict, levels, first = model.predictor(params, asked, sampling)
        z, estimates = (
            model.tokens(latents),
            [model.tokens(estimates[number]) for number in range(len(first.estimates))],
        )
        x, carried = predict(z, time, first._replace(estimates=estimates))
        times = jnp.stack([time, next_time])
        z = TimeGrid(times, levels).step(0, z, x)

        estimates = [model.latents(estimate, model.layout) for estimate in carried.estimates]
        return model.latents(z, model.layout), jnp.stack(estimates)

    return step


def _step_arguments(model: LatentDiffusion, config: RunConfig, batch: Any) -> Arguments:
    def array(*shape: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def text(*shape: Any) -> Any:
        shape = (*shape, config.text_length)
        if config.pretrained_text is None:
            return array(*shape, dtype=jnp.int32)
        encoder = config.text.encoder
        embeddings = array(*shape, encoder.dim, dtype=jnp.dtype(encoder.dtype))
        return {"embeddings": embeddings, "mask": array(*shape, dtype=jnp.bool_)}

    shape = (batch, *model.latent_shape)
    models = 2 if config.sampling.guidance.needs_unconditional else 1
    arguments = {"latents": array(*shape), "time": array(), "next_time": array(), "text": text(batch), "empty": text()}
    arguments["estimates"] = array(models, *shape)
    if model.denoiser.config.frame_prediction:
        arguments |= {"observed": array(*shape), "mask": array(*shape[:-1], 1)}
    return arguments
