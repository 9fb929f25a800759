"""Stages for fewer sampling steps: the teacher stays, packs give what clips give, and a wrong config is refused."""

import pathlib
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.config import build, plain
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.alpha_flow import AlphaFlowConfig
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec
from walt_jax.generation.latent_diffusion import LatentDiffusion, unboxed
from walt_jax.text.frozen import Embedded
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.training.accumulation import accumulated_gradients
from walt_jax.training.few_steps import (
    TEACHER,
    DistillationConfig,
    DistillationTask,
    MeanVelocityTask,
    without_captions,
    without_frames,
)
from walt_jax.training.run_config import RunConfig
from walt_jax.training.tasks import ConditioningConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CODEC = Codec(Tokenizer(TokenizerConfig(2, 4, (1,), (), 1, 4, patch_size=2, taps=1)))
SHAPE, CLASSES = (3, 2, 2, 2), 4
KNOBS = {
    "dim": 16, "heads": 2, "layers": 1, "windows": ((1, None, None),), "positions": "fractional", "relative": "rotary",
    "cross_attention": False, "classes": CLASSES, "frame_prediction": True,
}  # fmt: skip
CONDITIONING = ConditioningConfig((1,), 0.5)


def task_of(kind):
    if kind == "distillation":
        diffusion = DiffusionConfig(Schedule("linear", zero_terminal_snr=False), "v", self_conditioning=0.5)
        model = LatentDiffusion(CODEC, None, Denoiser(WaltConfig(**KNOBS), SHAPE[:3]), diffusion, SHAPE)
        return DistillationTask(model, CONDITIONING, DistillationConfig(2, GuidanceConfig(2.0)))
    config = WaltConfig(**KNOBS, self_conditioning=False, mean_velocity=True)
    model = LatentDiffusion(CODEC, None, Denoiser(config, SHAPE[:3]), DiffusionConfig(Schedule("flow"), "flow"), SHAPE)
    return MeanVelocityTask(model, CONDITIONING, AlphaFlowConfig(), 10)


def filled(model, seed=0):
    leaves, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def batch_of(rows):
    rng = np.random.default_rng(1)
    labels = np.array([[number % (CLASSES + 1)] for number in range(rows)], np.int32)
    return {"latents": rng.normal(size=(rows, *SHAPE)).astype(np.float32), "text": labels}


@pytest.mark.parametrize("kind", ["distillation", "mean velocity"])
def test_micro_batches_give_the_whole_batchs_gradients_and_leave_the_teacher(kind):
    task, batch = task_of(kind), batch_of(4)
    params, moving = filled(task.model), {TEACHER: filled(task.model, 1)} if kind == "distillation" else {}
    key = jax.random.key(3)
    run = jax.jit(
        lambda count: accumulated_gradients(task, count, params, moving, None, batch, key, 5), static_argnums=0
    )
    whole, parts = run(1), run(2)
    for ours, theirs in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(parts[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * float(jnp.abs(ours).max()) + 1e-7)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0])) > 1e-3
    for found in whole, parts:
        for kept, before in zip(jax.tree.leaves(found[1]), jax.tree.leaves(moving), strict=True):
            np.testing.assert_array_equal(kept, before)


def test_a_student_starts_as_its_teacher():
    """In buffers of their own, for a step donates its state."""
    task = task_of("distillation")
    params, moving = map(unboxed, task.init(jax.random.key(0)))
    served = filled(task.model)
    student, kept = jax.jit(task.start)(params, moving, served)
    for own, teacher, expected in zip(*map(jax.tree.leaves, (student, kept[TEACHER], served)), strict=True):
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_array_equal(teacher, expected)
        assert own.unsafe_buffer_pointer() != teacher.unsafe_buffer_pointer()


def test_steps_are_drawn_for_each_clip():
    task = task_of("mean velocity")
    drawn = task.draw(batch_of(64), jax.random.key(0))
    assert drawn.steps.end.shape == drawn.loss.time.shape == (64, 1)
    instants = drawn.steps.end == drawn.loss.time
    assert 0.2 < instants.mean() < 0.8 and (drawn.steps.end <= drawn.loss.time).all()


def test_guidance_is_from_nothing():
    """The empty caption of a text encoder, the label that stands for none, and no observed frames."""
    labels = without_captions(task_of("distillation").model, jnp.array([[[1]], [[2]]]))
    np.testing.assert_array_equal(labels, np.full((2, 1, 1), CLASSES))
    encoder = T5Encoder(T5Config(dim=8, layers=1, heads=1, head_dim=8, mlp_dim=8), 32)
    config = WaltConfig(**{**KNOBS, "classes": 0, "cross_attention": True})
    model = LatentDiffusion(CODEC, encoder, Denoiser(config, SHAPE[:3]), DiffusionConfig(Schedule("linear")), SHAPE)
    np.testing.assert_array_equal(without_captions(model, jnp.array([[[7, 8, 1, 0]]])), [[[1, 0, 0, 0]]])
    with pytest.raises(ValueError, match="trained with the denoiser"):
        without_captions(model, Embedded(jnp.zeros((1, 1, 2, 8)), jnp.ones((1, 1, 2), bool)))
    observed = {"observed": jnp.ones(2), "mask": jnp.ones(1), "low_res": jnp.ones(3)}
    assert {name: float(a.sum()) for name, a in without_frames(observed).items()} == {
        "observed": 0, "mask": 0, "low_res": 3,
    }  # fmt: skip


def knobs_of(name, *variant):
    return plain(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*variant), "config")


def changed(knobs, path, value):
    *groups, last = path.split(".")
    inner = knobs
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "needs a teacher"),
        ({"stages.steps_1.distillation.steps": 2}, "should be the half"),
        ({"stages.steps_1.distillation.guidance": {"scale": 2.0}}, "leave it out"),
        ({"stages.steps_1.distillation": None}, "only another distillation"),
        ({"sampling.guidance": {"scale": 2.0}}, "scale=1"),
        ({"diffusion.adaptive": 0.5}, "does not go with diffusion.adaptive"),
        ({"stages.steps_2.distillation.guidance.apg": {"momentum": -0.5}}, "momentum is for sampling"),
    ],
)
def test_a_distillation_that_makes_no_sense_is_refused(changes, message):
    knobs = knobs_of("walt_demo_few_steps", "1")
    build(RunConfig, knobs, "config")
    for path, value in changes.items():
        changed(knobs, path, value)
    with pytest.raises(UserError, match=message):
        build(RunConfig, knobs, "config")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser.mean_velocity": False}, "needs denoiser.mean_velocity"),
        ({"init_from": ""}, "starts from a flow model"),
        ({"stages.denoiser.alpha_flow": None}, "all have alpha_flow"),
        ({"sampling.sampler": "heun"}, "samplers other than"),
        ({"sampling.guidance.scale": 0.5}, "scale below 1"),
        ({"diffusion.schedule.name": "cosine"}, "schedule.name other than"),
    ],
)
def test_a_mean_velocity_that_makes_no_sense_is_refused(changes, message):
    knobs = knobs_of("walt_demo_alpha_flow")
    build(RunConfig, knobs, "config")
    for path, value in changes.items():
        changed(knobs, path, value)
    with pytest.raises(UserError, match=message):
        build(RunConfig, knobs, "config")
