"""The denoiser with tokens divided over eight virtual CPU devices, for `test_context`: prints JSON."""

import collections
import dataclasses
import json
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from oracles import filled, normal

from walt_jax.denoiser.latte_block import LatteConfig
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.uvit_block import UViTConfig
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.errors import UserError
from walt_jax.parallel.mesh import MeshConfig, make_mesh, on

BATCH, CHANNELS, TEXT = 4, 4, 5
WALT = WaltConfig(dim=32, heads=4, layers=2, windows=((1, None, None), (None, 2, 2)), self_conditioning=False)
FRAMES = WALT, (4, 4, 4)
# A model, its grid, and the meshes that divide its clips.
CASES = {
    "frames divide": (*FRAMES, [{"data": 2, "context": 2}, {"context": 4}]),
    "frames don't": (WALT, (3, 4, 4), [{"data": 2, "tensor": 2, "context": 2}, {"context": 4}]),
    "full, rotary": (
        dataclasses.replace(WALT, layers=1, windows=((None, None, None),), relative="rotary"),
        (3, 2, 4),
        [{"data": 2, "context": 4}],
    ),
    "halves of heads": (
        LatteConfig(dim=32, heads=4, layers=1, windows=((1, None, None), (None, 1, 1)), split="heads", classes=3,
                    cross_attention=False),
        (4, 2, 2),
        [{"context": 2}],
    ),
    "extra tokens": (
        UViTConfig(dim=32, heads=4, layers=1, windows=((None, None, None),), classes=3, cross_attention=False),
        (1, 4, 4),
        [{"context": 4}],
    ),
}  # fmt: skip
COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def inputs(config, grid):
    tokens = int(np.prod(grid))
    text = {"label": np.arange(BATCH)[:, None] % 3}
    if config.cross_attention:
        mask = np.arange(TEXT) < np.random.default_rng(0).integers(1, TEXT + 1, (BATCH, 1, 1))
        text = {"text": normal(1, BATCH, 1, TEXT, 8), "text_mask": mask}
    channels = CHANNELS * (2 if config.learned_sigma else 1)
    return (
        normal(2, BATCH, tokens, CHANNELS),
        normal(3, BATCH, 1),
        Condition(**text),
        normal(4, BATCH, tokens, channels),
    )


def programs(config, grid):
    """(the forward pass, that with gradients), both of (parameters, *inputs)."""
    model, layout = Denoiser(config, grid), Layout(grid=grid)

    def forward(params, noisy, time, condition, weights):
        return model.apply(params, noisy, time, condition, layout)

    def loss(params, noisy, *others):
        out = forward(params, noisy, *others)
        return (out * others[-1]).sum(), out

    return jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)), model, layout


def difference(found, expected):
    """‖a − b‖ / ‖b‖ of the array that differs most, and its name, without biases of keys: nothing depends on them."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    named = [(jax.tree_util.keystr(path), a, b) for (path, a), b in leaves]
    return max(
        (float(np.linalg.norm(a - b) / np.linalg.norm(b)), name)
        for name, a, b in named
        if "['key']['bias']" not in name
    )


def main():
    found = {"worst": {}, "forward": {}, "message": ""}
    for case, (config, grid, meshes) in CASES.items():
        forward, slopes, model, layout = programs(config, grid)
        params = filled(model, *inputs(config, grid)[:3], layout)
        expected = jax.device_get(slopes(params, *inputs(config, grid)))
        for sizes in meshes:
            name = f"{case}, {' × '.join(f'{axis} {size}' for axis, size in sizes.items())}"
            mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices())
            with on(mesh):
                rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
                everywhere = NamedSharding(mesh, PartitionSpec())
                arguments = jax.device_put(params, everywhere), *jax.device_put(inputs(config, grid), rows)
                forward, slopes, *_ = programs(config, grid)
                found["worst"][name] = difference(jax.device_get(slopes(*arguments)), expected)
                if not case.startswith("frames"):
                    continue
                text = forward.lower(*arguments).compile().as_text()
            found["forward"][name] = collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))
    mesh = make_mesh(MeshConfig(data=1, context=8), jax.devices())
    config, grid = FRAMES
    try:
        with on(mesh):
            programs(config, (3, 4, 4))[0].lower(params_of(config, (3, 4, 4)), *inputs(config, (3, 4, 4)))
    except UserError as error:
        found["message"] = str(error)
    print(json.dumps(found))


def params_of(config, grid):
    _, _, model, layout = programs(config, grid)
    return filled(model, *inputs(config, grid)[:3], layout)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    main()
