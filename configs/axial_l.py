"""Axial attention: along time, height and width in turn (VideoGPT, Yan et al. 2021), in W.A.L.T-L's place and size.

    python -m walt_jax.main --config=configs/axial_l.py --config.data.source=FOLDER --workdir=runs/axial

Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_l.py")))["get_config"]()
    config.denoiser.windows = ((None, 1, 1), (1, None, 1), (1, 1, None))
    return config
