"""W.A.L.T on packs: clips and images of several sizes and lengths share one sequence; your own folder.

    python -m walt_jax.main --config=configs/walt_packed.py --config.data.source=FOLDER --workdir=runs/packed

A clip attends only to itself, has its own diffusion time and its own positions, whatever else is in the pack. Positions
are NaViT's fractions of a clip, and rotary within windows, so that sizes share what they learn. `--mode=data` reports
how much of a pack your clips fill. `--config.stages.denoiser.cached_clips=0` encodes and packs clips as they come,
instead of 512 clips before the first step.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    """The knobs."""
    config = parent(__file__, "walt_demo")
    config.data.update(source="", frames=17, height=48, width=80)
    config.text.update(vocab_size=1024, length=32)
    config.stages.tokenizer.update(steps=1300, batch_size=2)
    # Clips keep their aspect ratio in packs; the tokenizer learns on crops, of which few sizes have to be compiled.
    config.stages.tokenizer.shapes = {
        "wide": {"weight": 2.0},
        "tall": {"height": 80, "width": 48, "weight": 1.0},
        "image": {"frames": 1, "height": 96, "width": 96, "weight": 1.0},
    }
    shapes = {
        "clip": {"side": 64, "weight": 3.0},
        "slow": {"frames": 9, "side": 64, "stride": 2, "weight": 1.0},
        "large": {"frames": 9, "side": 80, "weight": 1.0},
        "image": {"frames": 1, "side": 96, "weight": 2.0},
    }
    config.tokenizer.update(downsample=((2, 2, 2), (2, 1, 1)), patch_size=2)
    config.denoiser.update(dim=192, heads=3, layers=6, windows=((1, None, None), (None, 3, 5)), isolate_images=True)
    config.stages.denoiser.update(
        steps=600, shapes=shapes, pack={"tokens": 1536, "clips": 16}, batch_size=2, cached_clips=512
    )
    config.evaluation.update(clips=16, samples_per_prompt=1, prompts=8)
    return config
