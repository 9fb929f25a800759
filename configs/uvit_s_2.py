"""U-ViT-S/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022).

    python -m walt_jax.main --config=configs/uvit_s_2.py --config.data.source=FOLDER --workdir=runs/uvit_s_2

44M parameters. See `uvit_l_2.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "uvit_l_2")
    config.denoiser.update(dim=512, heads=8, layers=13)
    return config
