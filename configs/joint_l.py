"""Joint spacetime attention, as Sora's report has it, on packs: any aspect ratio and length, images and video.

    python -m walt_jax.main --config=configs/joint_l.py --config.data.source=FOLDER --workdir=runs/joint

Every token of a clip sees all others of it. Positions are NaViT's fractions of a clip, and rotary; times are shifted by
the number of tokens. The recipe of Sora is not published: block and sizes here are DiT-L's, data and text those of
`walt_l_t2v.py`. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(fps=8.0, captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser = {
        "block": "dit",
        "dim": 1024,
        "heads": 16,
        "layers": 24,
        "windows": ((None, None, None),),
        "positions": "fractional",
        "relative": "rotary",
        "qk_norm": True,
        "learned_sigma": False,
        "scan": True,
        "remat": "dots",
        "dtype": "bfloat16",
    }
    config.diffusion = {
        "schedule": {"name": "flow"},
        "parameterization": "flow",
        "times": {"name": "logit_normal"},
        "base_tokens": 1280,
    }
    config.stages.denoiser.update(
        steps=550_000,
        shapes={
            "clip": {"side": 128, "weight": 3.0},
            "short": {"frames": 9, "side": 192, "weight": 1.0},
            "image": {"frames": 1, "side": 256, "weight": 2.0},
        },
        pack={"tokens": 8192, "clips": 32},
        batch_size=64,
        cached_clips=100_000,
    )
    config.sampling = {"sampler": "euler", "steps": 50, "guidance": {"scale": 5.0}, "batch_size": 16}
    config.evaluation.protocols = ()
    return config
