"""Open-Sora 1's STDiT-XL/2: spatial and temporal attention, then attention to text alone, in each block.

    python -m walt_jax.main --config=configs/stdit_xl_2.py --config.data.source=FOLDER --workdir=runs/stdit

Text-to-video of 16 × 256 × 256 pixels; one modulation for all blocks with a learned table each (PixArt-α, Chen et al.
2023). Captions are read by the published T5-XXL, in a folder `t5-v1_1-xxl` of the user's. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    here = pathlib.Path(__file__)
    config = runpy.run_path(str(here.with_name("latte_xl_2_v1.py")))["get_config"]()
    text = runpy.run_path(str(here.with_name("walt_l_t2v.py")))["get_config"]().text
    config.data.captions = "caption"
    config.text = text
    config.text.update(length=120, pretrained="t5-v1_1-xxl")
    config.text.encoder.update(dim=4096, heads=64, mlp_dim=10_240)
    config.denoiser.update(split="attentions", adaln="single", cross_attention=True, cross_keys="text", classes=0)
    config.sampling.guidance = ConfigDict({"scale": 7.0, "channels": 3})
    config.sampling.update(sampler="ddim", steps=100)
    return config
