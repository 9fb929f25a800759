"""Latte-XL/2, variant 2: all spatial blocks, then all temporal ones (Ma et al. 2024); ViViT's model 2.

    python -m walt_jax.main --config=configs/latte_xl_2_v2.py --config.data.source=FOLDER --workdir=runs/latte

See `latte_xl_2_v1.py`. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("latte_xl_2_v1.py")))["get_config"]()
    half = config.denoiser.layers // 2
    # One cycle of all blocks: there is nothing to scan over.
    config.denoiser.update(windows=((1, None, None),) * half + ((None, 1, 1),) * half, scan=False)
    return config
