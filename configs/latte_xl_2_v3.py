"""Latte-XL/2, variant 3: spatial, then temporal attention in each block (Ma et al. 2024); ViViT's model 3.

    python -m walt_jax.main --config=configs/latte_xl_2_v3.py --config.data.source=FOLDER --workdir=runs/latte

See `latte_xl_2_v1.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    config.denoiser.split = "attentions"
    return config
