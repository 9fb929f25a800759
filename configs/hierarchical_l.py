"""Windows from coarse to fine: whole clips by halves, quarters and eighths of a frame, in W.A.L.T-L's place and size.

    python -m walt_jax.main --config=configs/hierarchical_l.py --config.data.source=FOLDER --workdir=runs/hierarchical

Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_l.py")))["get_config"]()
    config.denoiser.windows = ((None, 8, 8), (None, 4, 4), (None, 2, 2))
    return config
