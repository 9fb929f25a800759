"""Axial attention, along time, height and width one after the other, with W.A.L.T-L's block and size.

    python -m walt_jax.main --config=configs/axial_l.py --config.data.source=FOLDER --workdir=runs/axial

VideoGPT (Yan et al. 2021) attends along the three axes too, but adds them up in one layer. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.denoiser.windows = ((None, 1, 1), (1, None, 1), (1, 1, None))
    return config
