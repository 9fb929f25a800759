"""U-ViT-L/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/uvit_l_2.py --config.data.source=FOLDER --workdir=runs/uvit_l_2

Time, class and patches are all tokens; blocks of the second half begin with what those of the first ended with; a
convolution comes last. 287M parameters; an FID of 3.40 in the paper after 300,000 steps of 1,024 images, with guidance.
Stable Diffusion's autoencoder and its noise schedule, images mirrored at random (see `dit_xl_2.py`). Not run here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other sizes change some."""
    adamw = {"name": "adamw", "clip_norm": 1e9}  # nothing is clipped
    each = {"log_every": 100, "checkpoint_every": 5000}
    data = {"source": "", "frames": 1, "height": 256, "width": 256, "captions": "label"}
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
                "block": "uvit",
                "dim": 1024,
                "heads": 16,
                "layers": 21,
                "windows": ((None, None, None),),
                "patch_size": (1, 2, 2),
                "classes": 1000,
                "output_conv": True,
                "remat": "dots",
                "dtype": "bfloat16",
            },
            "diffusion": {"schedule": {"name": "scaled_linear", "zero_terminal_snr": False}, "parameterization": "eps"},
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
                        "steps": 300_000,
                        "batch_size": 1024,
                        "ema_decay": 0.9999,
                        "cached_clips": 2_562_000,
                        "optimizer": {
                            **adamw,
                            "learning_rate": 2e-4,
                            "warmup_steps": 5000,
                            "final_fraction": 1.0,
                            "b1": 0.99,
                            "b2": 0.99,
                            "weight_decay": 0.03,
                        },
                    },
                },
                sort_keys=False,
            ),
            "sampling": {"sampler": "dpm++2m", "steps": 50, "guidance": {"scale": 1.4}, "batch_size": 16},
            "evaluation": {"clips": 256, "prompts": 101},
        }
    )
