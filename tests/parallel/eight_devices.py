"""Programs on eight virtual CPU devices, for `test_mesh_equality`: `python eight_devices.py quick` prints JSON.

Each difference is from one device: of the array that differs most, ‖a − b‖ / ‖b‖.
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

from walt_jax.denoiser.layout import PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion, SamplingConfig, unboxed
from walt_jax.parallel.mesh import (
    MeshConfig,
    batch_shardings,
    make_mesh,
    on,
    place_batch,
    replicated,
    spread_over_own_devices,
)
from walt_jax.parallel.rules import shardings
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.discriminator import DiscriminatorConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.training.checkpoint import Checkpoints
from walt_jax.training.latent_batches import encoded_clips
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.state import TrainState, abstract_state, make_train_step, state_shardings
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask
from walt_jax.training.tokenizer_task import TokenizerTask

ONE = MeshConfig(data=1)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=4),
    "context": MeshConfig(data=1, context=4),
    "data × fsdp × tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "data × context": MeshConfig(data=4, context=2),
}
STEPS, DECAY = 10, 0.9
CODEC = Codec(Tokenizer(TokenizerConfig(4, 8, (1, 2), ((2, 2, 2),), 1, 4, patch_size=2)))
GRID = (3, 4, 4)
WALT = WaltConfig(
    dim=32, heads=4, layers=2, windows=((None, 2, 2),), cross_attention=True, scan=True,
)  # fmt: skip


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def denoiser(config):
    text = T5Encoder(T5Config(16, 1, 4, 8, 32), 24) if config.cross_attention else None
    diffusion = DiffusionConfig(Schedule("linear"), self_conditioning=0.9 * config.self_conditioning)
    model = LatentDiffusion(CODEC, text, Denoiser(config, GRID), diffusion, (*GRID, 4))
    return DenoiserTask(model, ConditioningConfig((1, 2) if config.frame_prediction else (), 0.5))


def latents_batch():
    text = np.random.default_rng(0).integers(0, 24, (8, 5)).astype(np.int32)
    return {"latents": normal(1, 8, *GRID, 4), "text": text}


PACKED = dataclasses.replace(
    WALT, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary", scan=False,
    cross_attention=False, classes=23, frame_prediction=True,
)  # fmt: skip


def packs_batch():
    """Eight packs of a clip or two and padding."""
    packs = [[GRID], [(1, 4, 4), (2, 4, 4)], [GRID], [(2, 4, 2), (1, 2, 2)]] * 2
    places = place_clips(packs, 64, 2)
    windows = PACKED.attention_windows
    rows = PackRows({window.name: ((16, 4, 2),) for window in windows}, (16, 4))
    pack = make_pack(*places, windows, rows, PACKED.isolate_images, shards=8)
    text = np.random.default_rng(2).integers(0, 24, (8, 2, 1)).astype(np.int32)
    return {"tokens": normal(3, 8, 64, 4), "text": text, "pack": pack}


def tokenizer():
    game = LossConfig(adversarial=0.1, discriminator=DiscriminatorConfig(8, (1,)))
    return TokenizerTask(CODEC.tokenizer, game)


def video_batch():
    return {"video": np.random.default_rng(4).integers(0, 256, (8, 5, 16, 16, 3)).astype(np.uint8)}


CASES = {
    "denoiser": (denoiser(WALT), latents_batch, "adamw"),
    "packs": (denoiser(PACKED), packs_batch, "adafactor"),
    "tokenizer": (tokenizer(), video_batch, "adamw"),
}


def remembering(optimizer):
    """The optimizer, whose state also has the last gradients."""

    def init(params):
        return {"gradients": jax.tree.map(jnp.zeros_like, params), "inner": optimizer.init(params)}

    def update(gradients, state, params):
        updates, inner = optimizer.update(gradients, state["inner"], params)
        return updates, {"gradients": gradients, "inner": inner}

    return optax.GradientTransformation(init, update)


def optimizer_of(task, name):
    return remembering(make_optimizer(OptimizerConfig(name, 1e-3), STEPS, jax.eval_shape(task.init, KEY)[0]))


KEY = jax.random.key(0)


def train(case, config):
    """(losses, gradients of the first step, the state after all, the program)"""
    task, batch, name = CASES[case]
    optimizer, mesh = optimizer_of(task, name), make_mesh(config, jax.devices())
    like = abstract_state(task, optimizer, mesh, (), DECAY)
    divided = state_shardings(like)

    moving = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like.moving)
    with on(mesh, ()):
        create = jax.jit(lambda p: TrainState.create(p, moving, task, optimizer, DECAY), out_shardings=divided)
        state = create(jax.device_put(filled(like.params), divided.params))
        placed, losses, first = place_batch(batch(), mesh), [], None
        step = make_train_step(task, optimizer, DECAY, divided=divided).lower(state, None, placed, KEY).compile()
        for _ in range(STEPS):
            state, metrics = step(state, None, placed, KEY)
            losses.append(float(metrics["loss"]))
            first = first or jax.device_get(state.opt_state["gradients"])
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), (leaf.sharding, shape.sharding)
    return losses, first, state, step.as_text()


def filled(params):
    """All parameters random: what is zero at initialisation would hide mistakes."""
    leaves, tree = jax.tree.flatten(params)
    scales = [0.5 / (leaf.shape[-2] if leaf.ndim > 1 else 25) ** 0.5 for leaf in leaves]
    pairs = enumerate(zip(scales, leaves, strict=True))
    return tree.unflatten([scale * normal(number, *leaf.shape) for number, (scale, leaf) in pairs])


def difference(found, expected):
    """(of the array that differs most, its name)"""
    worst = 0.0, ""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, (float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)), jax.tree_util.keystr(path)))
    return worst


def sampled(config):
    """Videos, uint8: sampled with guidance, and decoded one latent frame after the other."""
    mesh, task = make_mesh(config, jax.devices()), CASES["denoiser"][0]
    boxed = jax.eval_shape(task.model.init, KEY)
    variables = filled(unboxed(jax.eval_shape(CODEC.tokenizer.init, KEY, jnp.zeros((1, 1, 4, 4, 3)))))
    text, settings = latents_batch()["text"], SamplingConfig(2, guidance=GuidanceConfig(scale=2.0))
    with on(mesh, ()):
        params = jax.device_put(filled(unboxed(boxed)), shardings(boxed, mesh))
        trained = TrainedTokenizer.unnormalised(jax.device_put(variables, replicated(mesh)), 4)
        free = np.broadcast_to(text[:1], text.shape)
        latents = task.model.sample(params, text, free, np.arange(8, dtype=np.uint32), settings)
        videos = CODEC.decode(trained, latents)[0]
        return np.asarray(videos), np.asarray(CODEC.decode_long(trained, normal(5, 8, *GRID, 4)))


def encoded():
    """Whether clips that are divided over all devices have one device's latents, to the last bit."""
    variables = filled(unboxed(jax.eval_shape(CODEC.tokenizer.init, KEY, jnp.zeros((1, 1, 4, 4, 3)))))
    trained = TrainedTokenizer.unnormalised(variables, 4)
    rng = np.random.default_rng(7)
    clips = [
        {"number": number, "text": "", "video": rng.integers(0, 256, (5, 16, 16, 3), np.uint8)} for number in range(21)
    ]

    def alone(trained, video):
        return CODEC.encode(trained, video)[0]

    everywhere = spread_over_own_devices(alone)
    assert everywhere(trained, clips[0]["video"][None]).shape == (1, *GRID, 4)  # fewer than devices
    one, all_of_them = (
        [clip.latents for clip in encoded_clips(functools.partial(encode, trained), clips, lambda count: None, **more)]
        for encode, more in ((alone, {}), (everywhere, {"devices": jax.device_count()}))
    )
    return len(one) == len(clips) and np.array_equal(one, all_of_them)


def restored(state, case):
    """Whether a state that was saved on one mesh comes back, to the last bit, on others and on one device."""
    task, _, name = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), writer=True)
        checkpoints.save(state, {}, {})
        checkpoints.wait()
        for config in (ONE, MESHES["fsdp"], MESHES["data × context"]):
            like = abstract_state(task, optimizer_of(task, name), make_mesh(config, jax.devices()), (), DECAY)
            found = checkpoints.restore(like)[0]
            for leaf, shape, saved in zip(*map(jax.tree.leaves, (found, like, state)), strict=True):
                assert leaf.sharding == shape.sharding, (leaf.sharding, shape.sharding)
                assert np.array_equal(leaf, saved)
        checkpoints.close()
    return True


def largest_array(config):
    """Numbers of the largest array of the program that makes a state."""
    task, mesh = CASES["denoiser"][0], make_mesh(config, jax.devices())
    divided = shardings(jax.eval_shape(task.init, KEY)[0], mesh)
    program = jax.jit(lambda: unboxed(task.init(KEY)[0]), out_shardings=divided).lower().compile().as_text()
    shapes = re.findall(r"(?:f32|u32)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def collectives(program):
    return collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", program))


QUICK = {
    "denoiser": ("fsdp", "data × fsdp × tensor", "data × context"),
    "packs": ("data × fsdp × tensor",),
    "tokenizer": ("data × fsdp × tensor",),
}


def main(which):
    found = {"equal": {}, "collectives": {}}
    for case, meshes in QUICK.items():
        losses, first, state, _ = train(case, ONE)
        for name in meshes if which == "quick" else MESHES:
            began = time.process_time()
            other_losses, other_first, other, program = train(case, MESHES[name])
            found["equal"][f"{case}, {name}"] = {
                "losses": difference(other_losses, losses),
                "gradients": difference(other_first, first),
                **{part: difference(vars(other)[part], vars(state)[part]) for part in ("params", "ema", "moving")},
            }
            found["collectives"][f"{case}, {name}"] = collectives(program)
            print(case, name, time.process_time() - began, file=sys.stderr)
            if (case, name) == ("denoiser", "data × fsdp × tensor"):
                found["restored"] = restored(other, case)
    pairs = zip(sampled(MESHES["data × fsdp × tensor"]), sampled(ONE), strict=True)
    apart = [np.abs(a.astype(int) - b) for a, b in pairs]
    found["videos"] = [{"most": int(d.max()), "share": float((d > 0).mean()), "shape": d.shape} for d in apart]
    found["encoded"] = encoded()
    found["largest"] = [largest_array(ONE), largest_array(MESHES["fsdp"])]
    print(json.dumps(found))


def for_tpu():
    """Collectives of the denoiser's step as TPUs' compiler makes them."""
    task, batch, name = CASES["denoiser"]
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh, optimizer = make_mesh(MeshConfig(data=1, fsdp=8), devices), optimizer_of(task, name)
    state, inputs = abstract_state(task, optimizer, mesh, (), DECAY), batch()

    def shape(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        divided = state_shardings(state)
        step = make_train_step(task, optimizer, DECAY, "tpu", divided)
        inputs = jax.tree.map(shape, inputs, batch_shardings(inputs, mesh))
        program = step.lower(state, None, inputs, shape(KEY, replicated(mesh))).compile().as_text()
    print(json.dumps(collectives(program)))


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if sys.argv[1] == "tpu":
        for_tpu()
    else:
        jax.config.update("jax_disable_most_optimizations", True)
        main(sys.argv[1])
