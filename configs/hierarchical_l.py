"""Windows from coarse to fine: whole clips by halves, quarters and eighths of a frame, with W.A.L.T-L's block and size.

    python -m walt_jax.main --config=configs/hierarchical_l.py --config.data.source=FOLDER --workdir=runs/hierarchical

Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.denoiser.windows = ((None, 8, 8), (None, 4, 4), (None, 2, 2))
    return config
