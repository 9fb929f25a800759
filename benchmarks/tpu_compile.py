"""Compiles the train step of a denoiser, dense and packed, for TPUs that are not attached: `pip install -e ".[tpu]"`.

    python benchmarks/tpu_compile.py --config=walt_l --topology=v5e:2x2 --out=tpu_compile.json

Parameters are replicated, clips are sharded over chips. Reports what the compiler does: seconds to compile, bytes of
HBM a chip, and that its attention, gathers and scans are something that a TPU can do. Needs no accelerator.
"""

import argparse
import json
import math
import os
import pathlib
import runpy
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it is not asked on which machine this is

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from walt_jax.config import build
from walt_jax.denoiser.layout import Needs, PackRows, make_pack, place_clips
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.run_config import RunConfig, make_model, make_task
from walt_jax.training.state import TrainState, make_train_step

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def main() -> None:
    """Compiles them and writes what the compiler says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="walt_l")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--chips", type=int, help="how many of the topology's; default: all")
    parser.add_argument("--clips_a_chip", type=int, default=4)
    parser.add_argument("--layouts", nargs="+", choices=("dense", "packed"), default=("dense", "packed"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    flags = parser.parse_args()
    knobs = runpy.run_path(str(CONFIGS / f"{flags.config}.py"))["get_config"]()
    config = build(RunConfig, json.loads(json.dumps(knobs.to_dict())), "config")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology).devices[: flags.chips]
    mesh = Mesh(np.array(devices), ("data",))
    rows = []
    both = batches(config, flags.clips_a_chip * len(devices), len(devices))
    for name in flags.layouts:
        found = compiled(config, both[name], mesh)
        rows.append({"name": name, "topology": flags.topology, "chips": len(devices), **found})
        print(json.dumps(rows[-1]), flush=True)
        flags.out.write_text(json.dumps(rows, indent=1) + "\n")


def batches(config: RunConfig, clips: int, packs: int) -> dict[str, dict]:
    """As many clips of the data's shape as a batch, and in packs, one a chip."""
    shape = config.tokenizer.latent_shape(*config.clip_shape().nominal)
    grid = config.denoiser.grid(shape[:3])
    text = jax.device_get(
        make_model(config, config.most_pieces).text_tokens(clips, config.text_length)
    )  # ids, or embeddings
    each = clips // packs
    positions, sizes = place_clips([[grid] * each] * packs, each * math.prod(grid), each)
    windows, isolate = config.denoiser.attention_windows, config.denoiser.isolate_images
    rows = PackRows.choose([Needs.of(positions[:1], sizes[:1], windows, isolate)])
    pack = make_pack(positions, sizes, windows, rows, isolate, shards=packs)
    width = shape[3] * math.prod(config.denoiser.patch_size)
    tokens = np.zeros((packs, each * math.prod(grid), width), np.float32)
    return {
        "dense": {"latents": np.zeros((clips, *shape), np.float32), "text": text},
        "packed": {
            "tokens": tokens,
            "text": jax.tree.map(lambda array: array.reshape(packs, each, *array.shape[1:]), text),
            "pack": pack,
        },
    }


def compiled(config: RunConfig, batch: dict, mesh: Mesh) -> dict:
    """What the compiler says of a train step."""
    stage, task = config.stages["denoiser"], make_task(config, "denoiser", config.most_pieces)
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    boxed, moving = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(stage.optimizer, stage.steps, boxed)
    state = jax.eval_shape(
        lambda params: TrainState.create(params, moving, task, optimizer, stage.ema_decay), unboxed(boxed)
    )

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def of_batch(leaf):
        whole = leaf.ndim == 0 or leaf.shape[0] % len(mesh.devices)
        return placed(leaf, everywhere if whole else divided)

    state = jax.tree.map(lambda leaf: placed(leaf, everywhere), state)
    arguments = state, None, jax.tree.map(lambda leaf: of_batch(jnp.asarray(leaf)), batch)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    step = make_train_step(task, optimizer, stage.ema_decay, platform="tpu")
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.trace(*arguments, key).lower(lowering_platforms=("tpu",))
    lowering = time.perf_counter() - began
    began = time.perf_counter()
    program = lowered.compile()
    memory = program.memory_analysis()
    return {
        "lowering_seconds": lowering,
        "compile_seconds": time.perf_counter() - began,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main()
