"""DiT-XL/2, class-conditional images of 256 × 256 pixels (Peebles and Xie 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/dit_xl_2.py --config.data.source=FOLDER --workdir=runs/dit_xl_2

675M parameters, 118.6 billion multiplications and additions forward. The paper has an FID of 19.47 after 400,000 steps
of 256 images, of 9.62 after 7 million, and of 2.27 with guidance of 1.5 on three of four channels. Its latents are
those of Stable Diffusion's autoencoder (`--config.tokenizer_from=VAE.safetensors`); without it, an image tokenizer of
the same shape, 32 × 32 × 4, is trained first. Not run here.

Each image of ImageNet is encoded twice, about half of the time mirrored: 42 GB of latents before the denoiser's first
step. `--config.stages.denoiser.cached_clips=0` encodes each batch in its step, which mirrors anew each time.

The paper compares this conditioning with `--config.denoiser.conditioning=adaln`, `in_context` and `cross_attention`.
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
                "block": "dit",
                "dim": 1152,
                "heads": 16,
                "layers": 28,
                "windows": ((None, None, None),),
                "patch_size": (1, 2, 2),
                "cross_attention": False,
                "classes": 1000,
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
                        "batch_size": 256,
                        "ema_decay": 0.9999,
                        "cached_clips": 2_562_000,
                        "optimizer": {**adamw, "learning_rate": 1e-4, "final_fraction": 1.0, "b1": 0.9, "b2": 0.999},
                    },
                },
                sort_keys=False,
            ),
            "sampling": {"sampler": "ddpm", "steps": 250, "guidance": {"scale": 1.5, "channels": 3}, "batch_size": 16},
            "evaluation": {"clips": 256, "prompts": 101, "protocols": ("imagenet_50k",)},
        }
    )
