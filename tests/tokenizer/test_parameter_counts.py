"""How many parameters each config's tokenizer and discriminator have, against counts by hand from the architecture."""

import pathlib
import runpy

import jax
import pytest

from walt_jax.config import build
from walt_jax.training.run_config import RunConfig, make_task

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def counted(name: str, stage: str) -> dict[str, int]:
    knobs = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    task = make_task(build(RunConfig, knobs, "config"), stage, vocab_size=0)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    sizes = {**params, **params["tokenizer"]}
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in sizes.items()}


def block(inputs: int, width: int, taps: int) -> int:
    """Two group norms, two convolutions, the second with a bias, and a shortcut where the width changes."""
    norms = 2 * inputs + 2 * width
    convolutions = taps * 9 * (inputs * width + width * width) + width
    return norms + convolutions + (inputs * width if inputs != width else 0)


def by_hand(config) -> tuple[int, int]:
    """(encoder, decoder), scale by scale."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    taps, blocks, pixels, channels = (
        config.taps,
        config.residual_blocks,
        3 * config.patch_size**2,
        config.latent_channels,
    )
    encoder, x = taps * 9 * pixels * widths[0] + widths[0], widths[0]
    for scale, width in enumerate(widths):
        for _ in range(blocks):
            encoder, x = encoder + block(x, width, taps), width
        if scale < len(widths) - 1:
            encoder += taps * 9 * width * width + width
    encoder += blocks * block(x, x, taps) + 2 * x + x * channels + channels
    decoder, x = taps * 9 * channels * x + x + blocks * block(x, x, taps), x
    for scale, width in reversed(list(enumerate(widths))):
        decoder += 2 * x * channels + 2 * x  # the adaptive norm
        for _ in range(blocks):
            decoder, x = decoder + block(x, width, taps), width
        if scale:
            time, height, across = config.downsample[scale - 1]
            made = widths[scale - 1] * time * height * across
            decoder, x = decoder + taps * 9 * x * made + made, widths[scale - 1]
    decoder += 2 * x + taps * 9 * x * pixels + pixels
    time, height, width = config.strides
    values = 3 * height * width * (1 + time)  # of a first frame's block and of a later one
    if config.block_transform:
        encoder, decoder = encoder + values * channels + 2 * channels, decoder + values * channels + values
    return encoder, decoder


@pytest.mark.parametrize(
    ("name", "stage", "millions"),
    [
        ("magvit2_video", "images", 105.2),
        ("magvit2_video", "video", 336.3),
        ("magvit2_video_256x448", "finetune", 336.3),
        ("magvit2_image", "images", 95.9),
        ("tokenizer_clips", "video", 3.17),
        ("walt_demo", "tokenizer", 1.97),
    ],
)
def test_the_tokenizers(name, stage, millions):
    counts = counted(name, stage)
    knobs = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config = build(RunConfig, knobs, "config")
    shape = config.tokenizer.of_images() if config.makes_images(stage) else config.tokenizer
    assert (counts["encoder"], counts["decoder"]) == by_hand(shape)
    assert counts["tokenizer"] == pytest.approx(millions * 1e6, rel=0.01)


def test_the_discriminator():
    assert counted("magvit2_video", "video")["discriminator"] == pytest.approx(64.0e6, rel=0.01)
