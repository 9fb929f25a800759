"""W.A.L.T's second super-resolution stage: 17 × 256 × 448 pixels to 17 × 512 × 896, from text, 419M parameters.

    python -m walt_jax.main --config=configs/walt_sr_4x.py --config.data.source=FOLDER --workdir=runs/sr_4x

As `walt_sr_2x.py`, with 24 layers of width 1024 and 275,000 steps (table 8, whose patch of 4 keeps the other stages'
grid of 5 × 16 × 28 tokens; the text says 2). Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_sr_2x.py")))["get_config"]()
    config.data.update(height=512, width=896)
    config.denoiser.update(dim=1024, layers=24, patch_size=(1, 4, 4))
    config.stages.denoiser.update(steps=275_000)
    return config
