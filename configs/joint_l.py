"""Joint spacetime attention, as Sora's report has it, on packs: any aspect ratio and length, images and video.

    python -m walt_jax.main --config=configs/joint_l.py --config.data.source=FOLDER --workdir=runs/joint

Every token of a clip sees all others of it. Positions are NaViT's fractions of a clip, and rotary; times are shifted by
the number of tokens. The recipe of Sora is not published: sizes here are DiT-L's. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_l_t2v.py")))["get_config"]()
    config.denoiser.update(
        dim=1024,
        heads=16,
        layers=24,
        windows=((None, None, None),),
        positions="fractional",
        relative="rotary",
        cross_keys="text",
        self_conditioning=False,
        isolate_images=False,
    )
    config.diffusion = ConfigDict(
        {
            "schedule": {"name": "flow"},
            "parameterization": "flow",
            "times": {"name": "logit_normal"},
            "self_conditioning": 0.0,
            "base_tokens": 1280,
        }
    )
    config.stages.denoiser.update(
        shapes={
            "clip": {"side": 128, "weight": 3.0},
            "short": {"frames": 9, "side": 192, "weight": 1.0},
            "image": {"frames": 1, "side": 256, "weight": 2.0},
        },
        pack={"tokens": 8192, "clips": 32},
        batch_size=64,
        cached_clips=100_000,
    )
    config.sampling = ConfigDict({"sampler": "euler", "steps": 50, "guidance": {"scale": 5.0}, "batch_size": 16})
    return config
