"""W.A.L.T-L, class-conditional video of 17 × 128 × 128 pixels: UCF-101 in the paper (Gupta et al. 2023, table 8).

    python -m walt_jax.main --config=configs/walt_l.py --config.data.source=FOLDER --workdir=runs/walt_l

`FOLDER` has a `metadata.csv` whose column `label` names each clip's class; `--config.denoiser.classes` is their number.

The paper's denoiser has 313M parameters (`--mode=plan` counts this one's 313.1M) and, after 60,000 steps of 256 clips
and 50 steps of DDIM without guidance, an FVD of 46 ± 2. Work for many accelerators: it has not been run here. What
the paper doesn't state is chosen here: warm-up, weight decay, the average's decay, the share of dropped labels.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other `walt_*` of the papers' sizes change some."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("magvit2_video.py")))["get_config"]()
    config.data.update(captions="label", caption_dropout=0.1)
    config.tokenizer.latent_channels = 8
    config.tokenizer.head = ConfigDict({"name": "continuous"})
    config.update(
        {
            "denoiser": {
                "dim": 1024,
                "heads": 16,
                "layers": 24,
                "windows": ((1, 16, 16), (5, 8, 8)),
                "patch_size": (1, 1, 1),
                "adaln": "lora",
                "adaln_rank": 2,
                "cross_attention": False,
                "classes": 101,
                "self_conditioning": True,
                "isolate_images": True,
                "scan": True,
                "remat": "dots",
                "dtype": "bfloat16",
            },
            "diffusion": {"schedule": {"name": "linear"}, "parameterization": "v", "self_conditioning": 0.9},
            "sampling": {"sampler": "ddim", "steps": 50, "guidance": {"scale": 1.0}, "batch_size": 16},
        }
    )
    config.stages.denoiser = {
        "task": "denoiser",
        "steps": 60_000,
        "batch_size": 256,
        "ema_decay": 0.9999,
        "log_every": 100,
        "checkpoint_every": 5000,
        "optimizer": {
            "name": "adamw",
            "learning_rate": 5e-4,
            "warmup_steps": 5000,
            "final_fraction": 0.0,
            "b1": 0.9,
            "b2": 0.99,
            "clip_norm": 1.0,
        },
    }
    config.evaluation.update(samples_per_prompt=1, prompts=101)
    return config
