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

from walt_jax.config import build
from walt_jax.denoiser.dit_block import DiTConfig
from walt_jax.denoiser.latte_block import LatteConfig
from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import BLOCKS, AnyDenoiserConfig, Condition, Denoiser
from walt_jax.denoiser.uvit_block import UViTConfig
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.errors import UserError

CONFIG = WaltConfig(dim=16, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)))


KNOBS = {"dim": 16, "heads": 2, "layers": 2, "windows": [[1, None, None], [None, 2, 2]]}


@dataclasses.dataclass(frozen=True)
class Run:
    denoiser: AnyDenoiserConfig | None = None


def test_a_configs_block_says_which_familys_knobs_it_has():
    for block, made in BLOCKS.items():
        config = build(
            Run, {"denoiser": {**KNOBS, "block": block, "layers": 6 if block != "uvit" else 2 * 3}}, "config"
        )
        assert config.denoiser.block == block and made.__name__.lower() == f"{block}block"
        assert type(config.denoiser).__name__.lower() == f"{block}config"
    assert isinstance(build(Run, {"denoiser": KNOBS}, "config").denoiser, WaltConfig)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"block": "gpt"}, "config.denoiser.block is 'gpt'; choose walt or dit or uvit or latte or vdt or stdit."),
        ({"block": "dit", "adaln_rank": 2}, "config.denoiser.adaln_rank is read by nothing"),
        ({"split": "heads"}, "config.denoiser.split is read by nothing"),
        ({"block": "latte", "relative": "bias"}, "config.denoiser.relative is 'bias'; choose none or rotary."),
        ({"block": "uvit", "scan": True}, "config.denoiser.scan is True; choose False."),
        ({"block": "vdt", "windows": [[1, None, None]]}, "config.denoiser.windows has 1 entries; it should have 2."),
    ],
)
def test_a_knob_of_another_family_is_refused(changed, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        build(Run, {"denoiser": {**KNOBS, **changed}}, "config")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 3}, "layers=3 is not a multiple of the 2 windows"),
        ({"windows": ()}, "layers=2 is not a multiple of the 0 windows"),
        ({"heads": 3}, "heads=3 does not divide dim=16"),
        ({"dim": 6, "relative": "rotary"}, "relative='rotary' turns pairs of features, at least 3; heads have 3"),
    ],
)
def test_configs_that_can_not_be_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LatteConfig(16, 1, 2, ((1, None, None), (None, 1, 1)), split="heads"),
            "2 windows do not divide heads=1",
        ),
        (lambda: UViTConfig(16, 2, 2, ((None, None, None),)), "skips need a block in the middle"),
        (lambda: DiTConfig(18, 2, 2, ((None, None, None),)), "a dim that 4 divides, not 18"),
        (lambda: DiTConfig(16, 2, 2, ((None, None, None),), embedders_per_block=True, scan=True), "set scan=False"),
    ],
)
def test_families_refuse_what_can_not_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
    inputs = np.zeros((1, tokens, channels)), np.zeros((1, 1)), condition, layout
    return jax.eval_shape(Denoiser(config, bounds).init, jax.random.key(0), *inputs)


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
    config = WaltConfig(dim, 2, layers, PAPERS_WINDOWS, adaln_rank=rank, scan=scan)
    modulation, _ = counts(config)
    assert modulation == 6 * dim**2 + layers * (dim * rank + rank * 6 * dim)


def test_the_papers_modulation():
    """Table 8: ViT-g's is 12M, with 475M if separate."""
    vit_g = WaltConfig(1408, 16, 40, PAPERS_WINDOWS, scan=True)
    assert round(counts(vit_g)[0] / 1e6, 1) == 12.7
    assert round(counts(dataclasses.replace(vit_g, adaln_rank=None))[0] / 1e6) == 476


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (WaltConfig(1024, 16, 24, PAPERS_WINDOWS, scan=True), 419),
        (WaltConfig(1024, 16, 24, PAPERS_WINDOWS, cross_attention=False, classes=101, scan=True), 313),
        (WaltConfig(1152, 16, 28, PAPERS_WINDOWS, cross_attention=False, classes=101, scan=True), 460),
    ],
    ids=["L with text", "L of classes", "XL of classes"],
)
def test_the_papers_sizes(config, millions):
    _, everything = counts(config)
    assert abs(everything / (1e6 * millions) - 1) < 0.01
