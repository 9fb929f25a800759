"""Latte-XL/2, variant 1: video of 16 × 256 × 256 pixels, spatial and temporal blocks alternate (Ma et al. 2024).

    python -m walt_jax.main --config=configs/latte_xl_2_v1.py --config.data.source=FOLDER --workdir=runs/latte

The best of the paper's four: an FVD of 34.00 on FaceForensics, 59.82 on SkyTimelapse, 477.97 on UCF-101, 159.60 on
Taichi-HD. Every third frame of video of 25 frames a second; gradients are clipped at 0.1 after 100,000 steps. Each
frame is encoded by itself, as in the paper: 16 × 32 × 32 × 4. Not run here.

A hundred windows of each clip of UCF-101 are encoded before the denoiser's first step: 350 GB of latents.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; other models of video change some."""
    adamw = {"name": "adamw", "clip_norm": 1e9}  # nothing is clipped
    each = {"log_every": 100, "checkpoint_every": 5000}
    data = {"source": "", "frames": 16, "height": 256, "width": 256, "captions": "label", "fps": 25 / 3}
    return ConfigDict(
        {
            "seed": 0,
            "data": {**data, "caption_dropout": 0.1, "flips": 0.5, "max_bad_fraction": 0.05},
            "tokenizer": {
                "latent_channels": 4,
                "base_channels": 128,
                "channel_multipliers": (1, 1, 2, 4),
                "downsample": ((1, 2, 2),) * 3,
                "residual_blocks": 4,
                "norm_groups": 32,
                "patch_size": 1,
                "taps": 1,
                "dtype": "bfloat16",
            },
            "losses": {
                "reconstruction": 5.0,
                "adversarial": 0.1,
                "discriminator": {"base_channels": 128, "channel_multipliers": (2, 4, 4, 4, 4)},
            },
            "denoiser": {
                "block": "latte",
                "dim": 1152,
                "heads": 16,
                "layers": 28,
                "windows": ((1, None, None), (None, 1, 1)),
                "patch_size": (1, 2, 2),
                "cross_attention": False,
                "classes": 101,
                "scan": True,
                "remat": "dots",
                "dtype": "bfloat16",
            },
            "diffusion": {"schedule": {"name": "linear", "zero_terminal_snr": False}, "parameterization": "eps"},
            "stages": ConfigDict(
                {
                    "images": {
                        **each,
                        "task": "tokenizer",
                        "steps": 1_351_000,
                        "batch_size": 256,
                        "ema_decay": 0.999,
                        "optimizer": {**adamw, "learning_rate": 1e-4, "warmup_steps": 5000, "b1": 0.0},
                    },
                    "denoiser": {
                        **each,
                        "task": "denoiser",
                        "steps": 400_000,
                        "batch_size": 40,
                        "ema_decay": 0.9999,
                        "cached_clips": 1_332_000,
                        "optimizer": {
                            **adamw,
                            "learning_rate": 1e-4,
                            "final_fraction": 1.0,
                            "b1": 0.9,
                            "b2": 0.999,
                            "clip_norm": 0.1,
                            "clip_after": 100_000,
                        },
                    },
                },
                sort_keys=False,
            ),
            "sampling": {"sampler": "ddpm", "steps": 250, "guidance": {"scale": 1.0}, "batch_size": 16},
            "evaluation": {"clips": 256, "prompts": 101},
        }
    )
