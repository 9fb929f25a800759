"""What a LoRA stage trains: gradients of A and B alone, of the loss at the merged weights."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from walt_jax.config import build, plain
from walt_jax.errors import UserError
from walt_jax.generation import lora
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.training import plan
from walt_jax.training.lora_task import Frozen
from walt_jax.training.programs import programs, tracing
from walt_jax.training.run_config import RunConfig, make_task
from walt_jax.training.state import TrainState, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def knobs(**stage):
    found = plain(runpy.run_path(str(CONFIGS / "walt_lora.py"))["get_config"](), "config")
    tiny = plain(runpy.run_path(str(CONFIGS / "walt_tiny.py"))["get_config"](), "config")
    for name in ("data", "text", "tokenizer", "denoiser"):
        found[name] = tiny[name]
    found["denoiser"].update(layers=2, self_conditioning=False)
    found["diffusion"].update(self_conditioning=0.0)
    found["stages"]["lora"].update(batch_size=2, cached_clips=0, **stage)
    return found


@pytest.fixture(scope="module")
def config():
    return build(RunConfig, knobs(), "config")


@pytest.fixture(scope="module")
def task(config):
    return make_task(config, "lora", 32)


@pytest.fixture(scope="module")
def given(task):
    """A base, A and B as if trained, and a batch of latents."""
    draw = np.random.default_rng(0)

    def drawn(leaf):
        return np.float32(draw.normal(0, 0.1, leaf.shape))

    base = jax.tree.map(drawn, unboxed(jax.eval_shape(task.whole.init, jax.random.key(0))[0]))
    pairs = jax.tree.map(drawn, unboxed(jax.eval_shape(task.init, jax.random.key(0))[0]))
    latents = np.float32(draw.normal(0, 1, (2, *task.whole.model.latent_shape)))
    return base, pairs, {"latents": latents, "text": draw.integers(1, 32, (2, 16)).astype(np.int32)}


def test_gradients_are_the_slopes_of_the_loss(task, given):
    """The twin: differences of the whole task's loss at merged weights, along each model's gradient."""
    base, pairs, batch = given
    key, step = jax.random.key(2), jnp.int32(0)
    gradients, _, metrics = jax.jit(task.gradients)(pairs, {}, Frozen(None, base), batch, key, step)
    assert jax.tree.structure(gradients) == jax.tree.structure(pairs)

    @jax.jit
    def loss(pairs):
        merged = lora.merged(base, pairs, task.lora.alpha / task.lora.rank)
        return task.whole.gradients(merged, {}, None, batch, key, step)[2]["loss"]

    assert float(metrics["loss"]) == pytest.approx(float(loss(pairs)), rel=1e-6)
    for kind in (lora.A, lora.B):
        flat = flatten_dict(gradients)
        norm = float(optax.tree.norm({path: leaf for path, leaf in flat.items() if path[-1] == kind}))
        far = 0.02 / norm
        forth, back = (
            unflatten_dict({p: leaf + way * far * flat[p] * (p[-1] == kind) for p, leaf in flatten_dict(pairs).items()})
            for way in (1, -1)
        )
        slope = (float(loss(forth)) - float(loss(back))) / (2 * far)
        assert slope == pytest.approx(norm**2, rel=0.03), kind


def test_a_step_changes_a_and_b_and_keeps_no_copy_of_the_base(config, task, given):
    base, _, batch = given
    count = sum(leaf.size for leaf in jax.tree.leaves(base))
    pairs, moving = (unboxed(part) for part in jax.jit(task.init)(jax.random.key(1)))
    optimizer = optax.adam(1e-2)
    state = TrainState.create(pairs, moving, task, optimizer, 0.9)
    trained = sum(leaf.size for leaf in jax.tree.leaves(pairs))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 4 * trained + 10
    small = dataclasses.replace(task, lora=dataclasses.replace(task.lora, rank=1))
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(small.init, jax.random.key(0)))) < 0.1 * count
    before = jax.tree.map(np.array, (base, pairs))
    step = make_train_step(task, optimizer, 0.9)
    for number in range(2):
        state, metrics = step(state, Frozen(None, base), batch, jax.random.key(0))
        for path, leaf in flatten_dict(state.params).items():
            moved = bool((np.asarray(leaf) != flatten_dict(before[1])[path]).any())
            assert moved or (number == 0 and path[-1] == lora.A)  # A has no gradient while B is 0
    assert any("lora" not in name and "gradient_norm/denoiser" in name for name in metrics)
    for one, two in zip(jax.tree.leaves(before[0]), jax.tree.leaves(base), strict=True):
        assert (one == two).all()


def test_planned(config):
    """Operations are counted with the merge; the base is frozen memory of the step."""
    other = build(RunConfig, knobs(lora=None), "config")
    found, whole = (plan._stage(one, "lora", one.stages["lora"]) for one in (config, other))
    assert found["params"] < 0.6 * whole["params"]
    assert 0.5 < found["train_flops_per_step"] / whole["train_flops_per_step"] < 1.2
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "tensor", "context"))
    made = programs(config, mesh)
    with tracing(config, mesh):
        step, sampler = made["train_step"](), made["sampler_step"]()
    assert step.memory["frozen"] > sampler.memory["parameters"] > 2 * step.memory["parameters"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda k: k.update(init_from=""), "lora changes the model of another run: set init_from and tokenizer_from"),
        (lambda k: k.update(tokenizer_from=""), "lora|tokenizer"),
        (lambda k: k.update(init_from="dit.safetensors"), "lora changes the model of another run"),
        (lambda k: k["stages"].update(more=k["stages"]["lora"]), "no other stage of the denoiser"),
        (lambda k: k["stages"]["lora"]["lora"].update(rank=0), "lora.rank is 0; it should be at least 1"),
        (lambda k: k["stages"]["lora"].update(task="tokenizer"), "are for denoiser stages|cached_clips"),
    ],
)
def test_mistakes(change, says):
    changed = knobs()
    change(changed)
    with pytest.raises(UserError, match=says):
        build(RunConfig, changed, "config")
