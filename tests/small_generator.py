"""A generator of small videos with random parameters, for tests of what is built on one."""

import pathlib
import runpy

import jax
import numpy as np

from walt_jax.config import build, plain
from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.generation.codec import TrainedTokenizer
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import SamplingConfig, unboxed
from walt_jax.training.run_config import RunConfig, make_model

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


class Letters:
    """Captions by their letters."""

    def encode(self, captions):
        ids = [[2 + ord(letter) % 20 for letter in caption[:5]] + [1] for caption in captions]
        return np.array([row + [0] * (8 - len(row)) for row in ids], np.int32)


def filled(shapes):
    """Random parameters of these shapes."""
    params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(0, 0.1, leaf.shape), shapes)
    return jax.tree.map(np.float32, params)


def make(**denoiser):
    """A generator of videos of 9 × 16 × 16 with random parameters."""
    knobs = plain(runpy.run_path(str(CONFIGS / "walt_tiny.py"))["get_config"](), "config")
    knobs["data"].update(frames=9)
    knobs["denoiser"].update(dim=24, layers=2, **denoiser)
    config = build(RunConfig, knobs, "config")
    model = make_model(config, 32)
    key = jax.random.key(0)
    params = filled(unboxed(jax.eval_shape(model.init, key)))
    video = np.zeros((1, 5, 16, 16, 3), np.float32)
    variables = unboxed(jax.jit(model.codec.tokenizer.init)(key, video))
    tokenizer = TrainedTokenizer.unnormalised(variables, config.tokenizer.latent_channels)
    sampling = SamplingConfig(2, guidance=GuidanceConfig(scale=2.0), batch_size=2)
    return Generator(model, params, tokenizer, Letters(), sampling)
