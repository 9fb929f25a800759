"""W.A.L.T-L, class-conditional video of 17 × 128 × 128 pixels: UCF-101 in the paper (Gupta et al. 2023, table 8).

    python -m walt_jax.main --config=configs/walt_l.py --config.data.source=FOLDER --workdir=runs/walt_l
    python -m walt_jax.main --workdir=runs/walt_l --mode=evaluate --protocol=ucf101_walt

`FOLDER` has a `metadata.csv` whose column `label` names each clip's class; `--config.denoiser.classes` is their number.

Before the denoiser's first step, a million clips (100 windows of each clip of UCF-101) are encoded into the workdir:
41 GB of latents per million clips. Encoding each batch in its step instead (`--config.stages.denoiser.cached_clips=0`)
costs 58 % of the step's operations. `--mode=encode --workdir=TOKENIZER` writes the same latents with the tokenizer of
another run; train on them with `--config.tokenizer_from=TOKENIZER --config.stages.denoiser.latents=FOLDER`.

The paper's denoiser has 313M parameters (`--mode=plan` counts 313.1M here) and, after 60,000 steps of 256 clips and 50
steps of DDIM without guidance, an FVD of 46 ± 2. It needs many accelerators and has not been run here. Chosen here,
because the paper does not state them: warm-up, weight decay, EMA decay, label dropout. The tokenizer is that of
`magvit2_video.py` with continuous latents.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other `walt_*` of the papers' sizes change some."""
    tokenizer_stage = {
        "task": "tokenizer",
        "batch_size": 256,
        "ema_decay": 0.999,
        "log_every": 100,
        "checkpoint_every": 5000,
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-4,
            "warmup_steps": 5000,
            "final_fraction": 0.0,
            "b1": 0.0,
            "b2": 0.99,
            "clip_norm": 1e9,  # the papers clip nothing
        },
    }
    return ConfigDict(
        {
            "seed": 0,
            "mesh": {"data": 1, "fsdp": -1},
            "data": {
                "source": "",
                "frames": 17,
                "height": 128,
                "width": 128,
                "fps": 25.0,
                "captions": "label",
                "caption_dropout": 0.1,
                "cache_bytes": 2**30,
                "max_bad_fraction": 0.05,
            },
            "tokenizer": {
                "latent_channels": 8,
                "base_channels": 128,
                "channel_multipliers": (1, 2, 2, 4),
                "downsample": ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
                "residual_blocks": 4,
                "norm_groups": 32,
                "patch_size": 1,
                "taps": 3,
                "head": {"name": "continuous"},
                "route": "auto",
                "dtype": "bfloat16",
            },
            "losses": {
                "reconstruction": 5.0,
                "commitment": 0.25,
                "entropy": 0.1,
                "entropy_start": 3.0,
                "entropy_steps": 2000,
                "adversarial": 0.1,
                "r1": 10.0,
                "lecam": 0.001,
                "perceptual": 0.0,
                "perceptual_weights": "",
                "discriminator": {"base_channels": 128, "channel_multipliers": (2, 4, 4, 4, 4)},
            },
            "inflation": "last",
            "denoiser": {
                "dim": 1024,
                "heads": 16,
                "layers": 24,
                "windows": ((1, 16, 16), (5, 8, 8)),
                "patch_size": (1, 1, 1),
                "cross_attention": False,
                "classes": 101,
                "self_conditioning": True,
                "isolate_images": True,
                "scan": True,
                "remat": "dots",
                "dtype": "bfloat16",
            },
            "diffusion": {"schedule": {"name": "linear"}, "parameterization": "v", "self_conditioning": 0.9},
            "stages": ConfigDict(
                {
                    "images": {**tokenizer_stage, "steps": 100_000, "shapes": {"image": {"frames": 1}}},
                    "video": {
                        **tokenizer_stage,
                        "steps": 270_000,
                        "shapes": {"video": {"weight": 4.0}, "image": {"frames": 1, "weight": 1.0}},
                    },
                    "denoiser": {
                        "task": "denoiser",
                        "steps": 60_000,
                        "batch_size": 256,
                        "ema_decay": 0.9999,
                        "cached_clips": 1_000_000,
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
                    },
                },
                sort_keys=False,
            ),
            "sampling": {"sampler": "ddim", "steps": 50, "guidance": {"scale": 1.0}, "batch_size": 16},
            "evaluation": {
                "clips": 256,
                "perceptual_weights": "",
                "seed": 1234,
                "samples_per_prompt": 1,
                "prompts": 101,
                "protocols": ("ucf101_walt",),
            },
        }
    )
