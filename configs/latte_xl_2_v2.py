"""Latte-XL/2, variant 2: all spatial blocks, then all temporal ones (Ma et al. 2024).

    python -m walt_jax.main --config=configs/latte_xl_2_v2.py --config.data.source=FOLDER --workdir=runs/latte

See `latte_xl_2_v1.py`. It is not ViViT's model 2, whose temporal blocks get one token a frame. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    half = config.denoiser.layers // 2
    # One cycle of all blocks: there is nothing to scan over.
    config.denoiser.update(windows=((1, None, None),) * half + ((None, 1, 1),) * half, scan=False)
    return config
