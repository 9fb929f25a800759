"""W.A.L.T on packs: clips and images of several sizes and lengths beside each other in one sequence, of your folder.

    python -m walt_jax.main --config=configs/walt_packed.py --config.data.source=FOLDER --workdir=runs/packed

A clip sees itself alone, has a time of its own and keeps its place in the clip, whatever stands beside it. Positions
are NaViT's fractions of a clip, and rotary within windows, so that sizes share what they learn. `--mode=data`
says how much of a pack your clips fill.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_clips.py")))["get_config"]()
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
    config.denoiser.update(positions="fractional", relative="rotary", isolate_images=True)
    config.stages.denoiser.update(shapes=shapes, pack={"tokens": 1536, "clips": 16}, batch_size=2, cached_clips=512)
    return config
