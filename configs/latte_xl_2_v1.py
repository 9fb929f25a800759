"""Latte-XL/2, variant 1: video of 16 × 256 × 256 pixels, spatial and temporal blocks in turn (Ma et al. 2024).

    python -m walt_jax.main --config=configs/latte_xl_2_v1.py --config.data.source=FOLDER --workdir=runs/latte

The best of the paper's four: an FVD of 34.00 on FaceForensics, 59.82 on SkyTimelapse, 477.97 on UCF-101, 159.60 on
Taichi-HD. Each frame is encoded by itself, as in the paper: 16 × 32 × 32 × 4. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other variants change some."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dit_xl_2.py")))["get_config"]()
    config.data.update(frames=16)
    config.denoiser.update(windows=((1, None, None), (None, 1, 1)), classes=101)
    config.stages.denoiser.batch_size = 40
    config.sampling.guidance = ConfigDict({"scale": 1.0})
    return config
