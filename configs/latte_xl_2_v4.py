"""Latte-XL/2, variant 4: half of the heads attend in space, half in time (Ma et al. 2024); ViViT's model 4.

    python -m walt_jax.main --config=configs/latte_xl_2_v4.py --config.data.source=FOLDER --workdir=runs/latte

See `latte_xl_2_v1.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    config.denoiser.split = "heads"
    return config
