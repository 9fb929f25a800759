"""bfloat16 is for the computation alone: weights stay float32, and the whole game learns as it does in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from walt_jax.data.drawn import DrawnClips
from walt_jax.data.shapes import ClipShape
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.codec import Codec
from walt_jax.generation.latent_diffusion import LatentDiffusion, unboxed
from walt_jax.layers import Linear
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.discriminator import DiscriminatorConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.quantizers import HeadConfig
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.state import TrainState, make_train_step
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask
from walt_jax.training.tokenizer_task import TokenizerTask

STEPS = 40
CLIPS = DrawnClips("train", (ClipShape(5, 16, 16),))


def learn(dtype: str) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after some steps, and each one's metrics."""
    config = TokenizerConfig(8, 8, (1, 2), ((2, 2, 2),), 1, 4, 2, dtype, head=HeadConfig("lfq", groups=2))
    losses = LossConfig(adversarial=0.02, discriminator=DiscriminatorConfig(8, (1,)))
    task, key = TokenizerTask(Tokenizer(config), losses), jax.random.key(0)
    recipe = OptimizerConfig("adamw", 2e-3, warmup_steps=5, b1=0.0, b2=0.99)
    optimizer = make_optimizer(recipe, STEPS, jax.eval_shape(task.init, key)[0])
    state = TrainState.create(*map(unboxed, task.init(key)), task, optimizer, 0.9)
    step = make_train_step(task, optimizer, 0.9)
    rng, rows = np.random.default_rng(0), []
    for _ in range(STEPS):
        video = np.stack([CLIPS.sample(int(index), rng)["video"] for index in rng.integers(len(CLIPS), size=4)])
        state, metrics = step(state, None, {"video": video}, key)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


@pytest.fixture(scope="module")
def runs(quick_compilation):
    return {dtype: learn(dtype) for dtype in ("float32", "bfloat16")}


def test_weights_and_moments_stay_in_float32(runs):
    state, _ = runs["bfloat16"]
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float32)}


def test_it_learns_as_float32_does(runs):
    psnr = {dtype: np.mean([row["psnr_db"] for row in rows[-5:]]) for dtype, (_, rows) in runs.items()}
    start = runs["float32"][1][0]["psnr_db"]
    assert psnr["bfloat16"] > start + 3
    assert abs(psnr["bfloat16"] - psnr["float32"]) < 1
    assert all(np.isfinite(value) for _, rows in runs.values() for row in rows for value in row.values())


def equations(jaxpr):
    """All of a program's, those of the programs within it included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def narrow_sums(jaxpr, most):
    """Sums and products in bfloat16 over more than `most` values: (what, shapes), those of convolutions left out."""
    for equation in equations(jaxpr):
        shapes = [getattr(value.aval, "shape", ()) for value in equation.invars]
        if equation.outvars[0].aval.dtype != jnp.bfloat16:
            continue
        if equation.primitive.name in ("reduce_sum", "cumsum", "argmax", "reduce_max"):
            count = math.prod(shapes[0][axis] for axis in equation.params["axes"])
        elif equation.primitive.name == "dot_general":
            # Products are added up in float32 within a device; what is rounded is the sum, which devices add up.
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            count = math.prod(shapes[0][axis] for axis in contracted) if not batched else 0
        else:
            continue
        if count > most:
            yield equation.primitive.name, shapes


def test_sums_over_tokens_are_in_float32():
    """Gradients of all parameters, and norms, softmax and loss: no sum that grows with the batch is in bfloat16."""
    config = WaltConfig(
        dim=32, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)), classes=3, cross_attention=False,
        frame_prediction=True, dtype="bfloat16",
    )  # fmt: skip
    shape = (3, 8, 12, 4)  # 288 tokens
    codec = Codec(Tokenizer(TokenizerConfig(4, 4, (1,), (), 1, 4, taps=1)))
    model = LatentDiffusion(codec, None, Denoiser(config, shape[:3]), DiffusionConfig(Schedule("cosine")), shape)
    task = DenoiserTask(model, ConditioningConfig((1,), 0.5))
    params = unboxed(jax.eval_shape(model.init, jax.random.key(0)))
    batch = {"latents": jnp.zeros((2, *shape)), "text": jnp.zeros((2, 1), jnp.int32)}
    traced = jax.make_jaxpr(lambda p, b: task.gradients(p, {}, None, b, jax.random.key(0), 0))(params, batch)
    assert list(narrow_sums(traced.jaxpr, most=256)) == []  # sinusoids of time, the widest layer
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_a_layers_gradients_are_not_rounded_before_they_are_added_up():
    """1,001 is no bfloat16; its neighbours are 1,000 and 1,004."""
    layer, x = Linear(2, dtype=jnp.bfloat16), jnp.ones((7, 143, 3))
    params = unboxed(layer.init(jax.random.key(0), x))
    gradients = jax.grad(lambda params: layer.apply(params, x).astype(jnp.float32).sum())(params)
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, jnp.full(leaf.shape, 1001.0))
