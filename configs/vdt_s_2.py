"""VDT-S/2, see `vdt_l_2.py` (Lu et al. 2023). Not run here.

python -m walt_jax.main --config=configs/vdt_s_2.py --config.data.source=FOLDER --workdir=runs/vdt
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("vdt_l_2.py")))["get_config"]()
    config.denoiser.update(dim=384, heads=6, layers=12)
    return config
