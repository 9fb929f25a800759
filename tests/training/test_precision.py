"""bfloat16 is for the computation alone: weights stay float32, and the whole game learns as it does in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.data.drawn import DrawnClips
from walt_jax.data.shapes import ClipShape
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.discriminator import DiscriminatorConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.tokenizer.quantizers import HeadConfig
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.state import TrainState, make_train_step
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
