"""Open-Sora 1.0's STDiT-XL/2: spatial and temporal attention, then attention to text, in each block.

    python -m walt_jax.main --config=configs/stdit_xl_2.py --config.data.source=FOLDER --workdir=runs/stdit

Text-to-video of 16 × 256 × 256 pixels; one modulation for all blocks and a table in each (PixArt-α, Chen et al. 2023).
Captions are read by the published T5-XXL, in a folder `t5-v1_1-xxl` of the user's. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    config.data.update(captions="caption", flips=0.0)
    config.text = {
        "vocab_size": 32_128,
        "length": 120,
        "encoder": {"dim": 4096, "layers": 24, "heads": 64, "head_dim": 64, "mlp_dim": 10_240, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xxl",
    }
    config.denoiser = {
        "block": "stdit",
        "dim": 1152,
        "heads": 16,
        "layers": 28,
        "patch_size": (1, 2, 2),
        "scan": True,
        "remat": "dots",
        "dtype": "bfloat16",
    }
    config.stages.denoiser.cached_clips = None
    config.sampling = {"sampler": "ddim", "steps": 100, "guidance": {"scale": 7.0, "channels": 3}, "batch_size": 16}
    return config
