"""VDT-L/2: temporal attention first, then spatial attention with adaLN-Zero, in each block (Lu et al. 2023).

    python -m walt_jax.main --config=configs/vdt_l_2.py --config.data.source=FOLDER --workdir=runs/vdt

Video of 16 × 256 × 256 pixels. Frames that are given stand in the place of the noisy ones, and all tasks are masks:
prediction forward and backward, interpolation, single frames, any frames, and squares in space. An FVD of 225.7 on
UCF-101 in the paper. Its "L/2" has the width and depth of DiT-XL. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; VDT-S changes some."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("latte_xl_2_v1.py")))["get_config"]()
    config.denoiser.update(
        windows=((None, 1, 1), (1, None, None)),
        split="attentions",
        modulated="last",
        frame_prediction=True,
        observed_as="place",
    )
    config.conditioning = ConfigDict(
        {"kinds": ("start", "end", "every", "one", "random", "square"), "frames": (8,), "probability": 0.857}
    )
    return config
