"""Attention on packs on eight virtual CPU devices, for `test_packs_over_devices`: prints JSON."""

import json
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import LARGEST, filled, normal

from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.layout import Layout, Needs, PackRows, make_pack, place_clips
from walt_jax.denoiser.windows import Window

PACKS, TOKENS, CLIPS, DIM, HEADS, WORDS = 8, 64, 3, 32, 8, 4
GRIDS = [
    [(3, 2, 4), (1, 5, 6)],
    [(1, 1, 2), (2, 5, 3), (2, 4, 4)],
    [(3, 3, 6)],
    [],
    [(2, 2, 2)] * 3,
    [(1, 4, 4)] * 3,
    [(3, 4, 4), (1, 3, 3)],
    [(2, 5, 6)],
]
WINDOWS = Window(1, None, None), Window(None, 2, 2)  # half of the heads each
MESHES = {
    "data 4 × fsdp 2": (4, 2, 1, 1),
    "data 2 × fsdp 1 × tensor 4": (2, 1, 4, 1),
    "data 2 × tensor 2 × context 2": (2, 1, 2, 2),
}
COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def layout(shards):
    positions, sizes = place_clips(GRIDS, TOKENS, CLIPS)
    parts = zip(np.split(positions, shards), np.split(sizes, shards), strict=True)
    rows = PackRows.choose([Needs.of(*part, WINDOWS, True) for part in parts], text=WINDOWS)
    return Layout(pack=make_pack(positions, sizes, WINDOWS, rows, True, shards))


def inputs():
    mask = np.arange(WORDS) < np.random.default_rng(0).integers(0, WORDS + 1, (PACKS, CLIPS, 1))
    return normal(1, PACKS, TOKENS, DIM), normal(2, PACKS, CLIPS, WORDS, DIM), mask, normal(3, PACKS, TOKENS, DIM)


def difference(found, expected):
    """‖a − b‖ / ‖b‖ of the array that differs most, and its name."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    return max(
        (float(np.linalg.norm(a - b) / np.linalg.norm(b)), jax.tree_util.keystr(path)) for (path, a), b in leaves
    )


def main():
    bounds = tuple(window.bounds(LARGEST) for window in WINDOWS)
    module = WindowAttention(HEADS, WINDOWS, bounds, "bias", True, "none", np.dtype("float32"))
    params = filled(module, inputs()[0], layout(1), *inputs()[1:3])

    def loss(params, x, text, mask, weights, layout):
        out = module.apply(params, x, layout, text, mask, isolate_images=True)
        return (out * weights).sum(), out

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    found = {"worst": {}, "kinds": {}, "largest": {}, "tokens": PACKS * TOKENS * DIM // 8}
    expected, one_shard = (jax.device_get(slopes(params, *inputs(), layout(shards))) for shards in (8, 1))
    found["worst"]["1 device, 1 shard"] = difference(one_shard, expected)
    for name, sizes in MESHES.items():
        names = ("data", "fsdp", "tensor", "context")
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
        divided = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        with jax.set_mesh(mesh):
            everywhere = NamedSharding(mesh, PartitionSpec())
            arguments = jax.device_put(params, everywhere), *jax.device_put((*inputs(), layout(8)), divided)
            program = slopes.lower(*arguments).compile()
            ours = jax.device_get(program(*arguments))
        found["worst"][name] = difference(ours, expected)
        collectives = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program.as_text())
        found["kinds"][name] = [kind for _, kind in collectives]
        shapes = [shape for arrays, _ in collectives for shape in re.findall(r"\[([\d,]*)\]", arrays)]
        found["largest"][name] = max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main()
