"""NaViT's packs (Dehghani et al. 2023) of DiT-L: images of any resolution and aspect ratio, with tokens dropped.

    python -m walt_jax.main --config=configs/navit_l.py --config.data.source=FOLDER --workdir=runs/navit

Large images lose more of their tokens than small ones. `pack.drop.kind` is "constant", "beta" or "resolution". Not run
here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "dit_xl_2")
    config.denoiser.update(dim=1024, heads=16, layers=24, positions="fractional", qk_norm=True, learned_sigma=False)
    config.diffusion.update(parameterization="v", schedule={"name": "linear"})
    sides = (64, 128, 192, 256, 320, 384)
    config.stages.denoiser.update(
        shapes={f"side_{side}": {"side": side} for side in sides},
        pack={"tokens": 1024, "clips": 64, "drop": {"kind": "resolution", "rate": 0.5, "slope": 0.3}},
        batch_size=64,
        cached_clips=100_000,
    )
    config.sampling = {"sampler": "ddim", "steps": 50, "guidance": {"scale": 1.5}, "batch_size": 16}
    config.evaluation.protocols = ()
    return config
