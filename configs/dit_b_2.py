"""DiT-B/2, class-conditional images of 256 × 256 pixels (Peebles and Xie 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/dit_b_2.py --config.data.source=FOLDER --workdir=runs/dit_b_2

130M parameters, 23.01 billion multiplications and additions forward; an FID of 43.47 in the paper after
400,000 steps of 256 images, without guidance. See `dit_xl_2.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "dit_xl_2")
    config.denoiser.update(dim=768, heads=12, layers=12)
    return config
