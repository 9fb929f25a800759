"""W.A.L.T on packs: clips and images of several sizes and lengths beside each other in one sequence, of your folder.

    python -m walt_jax.main --config=configs/walt_packed.py --config.data.source=FOLDER --workdir=runs/packed

A clip sees itself alone, has a time of its own and keeps its place in the clip, whatever stands beside it. Positions
are NaViT's fractions of a clip, and rotary within windows, so that sizes share what they learn. Of a pack's tokens 0.99
are of clips (computed for these shapes).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_clips.py")))["get_config"]()
    config.data.update(frames=17, height=48, width=80)
    shapes = {
        "wide": {"weight": 2.0},
        "square": {"height": 64, "width": 64, "weight": 1.0},
        "tall": {"height": 80, "width": 48, "weight": 1.0},
        "short": {"frames": 9, "height": 64, "width": 96, "weight": 1.0},
        "image": {"frames": 1, "height": 96, "width": 96, "weight": 1.0},
        "small_image": {"frames": 1, "height": 48, "width": 64, "weight": 1.0},
    }
    config.denoiser.update(positions="fractional", relative="rotary", images_alone=True)
    config.stages.tokenizer.shapes = shapes
    config.stages.denoiser.update(shapes=shapes, pack={"tokens": 1536, "clips": 12}, batch_size=2, cached_clips=512)
    return config
