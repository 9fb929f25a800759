"""One real clip, learned by heart: what the encoder and decoder can hold, and how fast the recipe finds it."""

import pathlib

import jax
import numpy as np
import pytest

from walt_jax.data.video import read_clip
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.losses import LossConfig
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.state import TrainState, make_train_step
from walt_jax.training.tokenizer_task import TokenizerTask

CLIP = pathlib.Path(__file__).parents[2] / "shared" / "data" / "clips" / "cogvideo__1.mp4"
STEPS = 600


@pytest.mark.slow
@pytest.mark.skipif(not CLIP.exists(), reason=f"{CLIP.name} is not there")
def test_one_real_clip_is_learned_to_35_db():
    clip = read_clip(CLIP, fps=8, max_frames=17, short_side=64)[:, :64, :64]
    config = TokenizerConfig(16, 32, (1, 2, 2), ((2, 2, 2), (2, 1, 1)), 1, 8, patch_size=2)
    task = TokenizerTask(Tokenizer(config), LossConfig())
    key = jax.random.key(0)
    recipe = OptimizerConfig("muon", 2e-3, 0.02, warmup_steps=50, final_fraction=0.02)
    optimizer = make_optimizer(recipe, STEPS, jax.eval_shape(task.init, key)[0])
    state = TrainState.create(*map(unboxed, task.init(key)), task, optimizer, 0.98)
    step = make_train_step(task, optimizer, 0.98)
    reached = []
    for _ in range(STEPS):
        state, metrics = step(state, None, {"video": np.asarray(clip)[None]}, key)
        reached.append(float(metrics["psnr_db"]))
        if max(reached) >= 35:
            break
    assert max(reached) >= 35, f"{max(reached):.1f} dB after {len(reached)} steps"
    print(f"{reached[-1]:.1f} dB after {len(reached)} steps")
