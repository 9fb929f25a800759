"""W.A.L.T-XL: `walt_l.py` with 28 layers of width 1152, 460M parameters; an FVD of 36 ± 2 on UCF-101 in the paper.

    python -m walt_jax.main --config=configs/walt_xl.py --config.data.source=FOLDER --workdir=runs/walt_xl

60,000 steps of 256 clips on accelerators (table 8); not run here. Before the denoiser's first step, a million clips are
encoded: 41 GB of latents per million clips (`walt_l.py` says more).
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.denoiser.update(dim=1152, layers=28)
    return config
