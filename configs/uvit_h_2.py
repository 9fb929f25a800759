"""U-ViT-H/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022).

    python -m walt_jax.main --config=configs/uvit_h_2.py --config.data.source=FOLDER --workdir=runs/uvit_h_2

501M parameters. See `uvit_l_2.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "uvit_l_2")
    config.denoiser.update(dim=1152, heads=16, layers=29, output_conv=False)
    return config
