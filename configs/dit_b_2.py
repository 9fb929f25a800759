"""DiT-B/2, class-conditional images of 256 × 256 pixels (Peebles and Xie 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/dit_b_2.py --config.data.source=FOLDER --workdir=runs/dit_b_2

130M parameters, 23.01 billion multiplications and additions forward; an FID of 43.47 in the paper after
400,000 steps of 256 images, without guidance. See `dit_xl_2.py`. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dit_xl_2.py")))["get_config"]()
    config.denoiser.update(dim=768, heads=12, layers=12)
    return config
