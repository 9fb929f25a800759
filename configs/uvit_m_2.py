"""U-ViT-M/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022).

    python -m walt_jax.main --config=configs/uvit_m_2.py --config.data.source=FOLDER --workdir=runs/uvit_m_2

131M parameters. See `uvit_l_2.py`. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("uvit_l_2.py")))["get_config"]()
    config.denoiser.update(dim=768, heads=12, layers=17)
    return config
