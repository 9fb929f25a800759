"""W.A.L.T's first super-resolution stage: 17 × 128 × 224 pixels to 17 × 256 × 448, from text, 1.3B parameters.

    python -m walt_jax.main --config=configs/walt_sr_2x.py --config.data.source=FOLDER --workdir=runs/sr_2x

Latents of the low resolution, with noise of a level that the model is told, are upscaled by a convolution and stand
beside the noisy ones. 675,000 steps of 512 clips (table 8). How the two are joined and how much noise there is (up to
t = 0.3 here) the paper doesn't state. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_l_t2v.py")))["get_config"]()
    config.data.update(height=256, width=448)
    config.denoiser.update(
        dim=1408, layers=40, patch_size=(1, 2, 2), windows=((1, 16, 28), (5, 8, 14)), upscale=2, remat="block"
    )
    config.conditioning = {"low_res_noise": 0.3}
    config.stages.denoiser.update(steps=675_000, ema_decay=0.0)
    config.stages.denoiser.optimizer = {"name": "adafactor", "learning_rate": 5e-4, "warmup_steps": 5000}
    return config
