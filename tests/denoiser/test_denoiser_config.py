"""What a denoiser's config may be, and what follows from it without running it."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser

CONFIG = DenoiserConfig(dim=16, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"observed_as": "norm"}, "observed_as is for frame_prediction"),
        ({"observed_as": "cross", "frame_prediction": True}, "takes the cross-attention"),
        ({"condition_by": "tokens"}, "don't go together"),
        ({"adaln": "none"}, "don't go together"),
        ({"condition_by": "cross", "adaln": "none"}, "tells text as well"),
        ({"modulated": "last"}, "is for split='attentions'"),
        ({"split": "heads", "heads": 1}, "2 windows do not divide heads=1"),
        ({"cross_attention": False, "cross_keys": "text"}, "cross_keys is for"),
        ({"skips": True, "scan": True, "windows": ((None, 2, 2),)}, "can't be scanned"),
        ({"skips": True, "windows": ((None, 2, 2),)}, "2 times the windows is even"),
        ({"told_by": "each"}, "is for adaln='separate' without scan"),
        ({"output_conv": True, "learned_sigma": True}, "exclude each other"),
        ({"dim": 18, "heads": 2, "positions": "sincos"}, "a dim that 4 divides, not 18"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(changed, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        dataclasses.replace(CONFIG, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 3}, "layers=3 is not a multiple of the 2 windows"),
        ({"windows": ()}, "layers=2 is not a multiple of the 0 windows"),
        ({"heads": 3}, "heads=3 does not divide dim=16"),
        ({"dim": 6, "relative": "rotary"}, "relative='rotary' turns pairs of features, at least 3; heads have 3"),
        ({"adaln": "separate", "adaln_rank": 3}, "adaln_rank is for adaln='lora'"),
    ],
)
def test_configs_that_can_not_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


def test_patches_divide_the_grid():
    config = dataclasses.replace(CONFIG, patch_size=(1, 2, 2))
    assert config.grid((5, 16, 24)) == (5, 8, 12)
    with pytest.raises(ValueError, match=r"patch_size \(1, 2, 2\) does not divide latents of \(5, 15, 24\)"):
        config.grid((5, 15, 24))


def test_each_window_of_a_model_is_named_once():
    config = dataclasses.replace(CONFIG, windows=((None, 2, 2), (None, 2, 2)))
    assert config.attention_windows == ((None, 2, 2), (1, None, None))
    assert CONFIG.attention_windows == ((1, None, None), (None, 2, 2))
    assert dataclasses.replace(config, cross_attention=False).attention_windows == ((None, 2, 2),)


def shapes(config, bounds, channels, text):
    layout, tokens = Layout(grid=bounds), math.prod(bounds)
    condition = Condition(
        text=np.zeros((1, 1, 3, text)) if config.cross_attention else None,
        text_mask=np.ones((1, 1, 3), bool) if config.cross_attention else None,
        label=np.zeros((1, 1), int) if config.classes else None,
    )
    given = np.zeros((1, tokens, channels)), np.zeros((1, 1)), condition, layout
    return jax.eval_shape(Denoiser(config, bounds).init, jax.random.key(0), *given)


def counts(config, bounds=(5, 16, 16), channels=8, text=2048):
    """(parameters of the modulation, without biases; of all), for latents of 8 channels and T5-XL's embeddings."""
    params = nn.meta.unbox(shapes(config, bounds, channels, text))["params"]
    leaves = [(jax.tree_util.keystr(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    modulation = sum(size for name, size in leaves if re.search(r"'adaln(_a|_b)?'\]\['kernel'", name))
    return modulation, sum(size for _, size in leaves)


PAPERS_WINDOWS = ((1, None, None), (None, 8, 8))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_adaln_lora_has_as_many_parameters_as_the_paper_says(dim, rank, count, scan):
    dim, layers = 4 * dim, 2 * count
    config = DenoiserConfig(dim, 2, layers, PAPERS_WINDOWS, adaln_rank=rank, scan=scan)
    modulation, _ = counts(config)
    assert modulation == 6 * dim**2 + layers * (dim * rank + rank * 6 * dim)


def test_the_papers_modulation():
    """Table 8: ViT-g's is 12M, with 475M if separate."""
    vit_g = DenoiserConfig(1408, 16, 40, PAPERS_WINDOWS, scan=True)
    assert round(counts(vit_g)[0] / 1e6, 1) == 12.7
    assert round(counts(dataclasses.replace(vit_g, adaln="separate"))[0] / 1e6) == 476


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (DenoiserConfig(1024, 16, 24, PAPERS_WINDOWS, scan=True), 419),
        (DenoiserConfig(1024, 16, 24, PAPERS_WINDOWS, cross_attention=False, classes=101, scan=True), 313),
        (DenoiserConfig(1152, 16, 28, PAPERS_WINDOWS, cross_attention=False, classes=101, scan=True), 460),
    ],
    ids=["L with text", "L of classes", "XL of classes"],
)
def test_the_papers_sizes(config, millions):
    _, everything = counts(config)
    assert abs(everything / (1e6 * millions) - 1) < 0.01
