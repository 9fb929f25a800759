"""U-ViT-H/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022).

    python -m walt_jax.main --config=configs/uvit_h_2.py --config.data.source=FOLDER --workdir=runs/uvit_h_2

501M parameters. See `uvit_l_2.py`. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("uvit_l_2.py")))["get_config"]()
    config.denoiser.update(dim=1152, heads=16, layers=29, output_conv=False)
    return config
