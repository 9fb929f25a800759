"""U-ViT-S/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022).

    python -m walt_jax.main --config=configs/uvit_s_2.py --config.data.source=FOLDER --workdir=runs/uvit_s_2

44M parameters. See `uvit_l_2.py`. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("uvit_l_2.py")))["get_config"]()
    config.denoiser.update(dim=512, heads=8, layers=13)
    return config
