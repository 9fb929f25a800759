"""NaViT's packs (Dehghani et al. 2023) of DiT-L: images of any resolution and aspect ratio, with tokens dropped.

    python -m walt_jax.main --config=configs/navit_l.py --config.data.source=FOLDER --workdir=runs/navit

Large images lose more of their tokens than small ones. `pack.drop.kind` is "constant", "beta" or "resolution". Not run
here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dit_l_2.py")))["get_config"]()
    config.denoiser.update(positions="fractional", qk_norm=True, learned_sigma=False)
    config.diffusion.update(parameterization="v", schedule={"name": "linear"})
    sides = (64, 128, 192, 256, 320, 384)
    config.stages.denoiser.update(
        shapes={f"side_{side}": {"side": side} for side in sides},
        pack={"tokens": 1024, "clips": 64, "drop": {"kind": "resolution", "rate": 0.5, "slope": 0.3}},
        batch_size=64,
        cached_clips=100_000,
    )
    config.sampling = ConfigDict({"sampler": "ddim", "steps": 50, "guidance": {"scale": 1.5}, "batch_size": 16})
    return config
