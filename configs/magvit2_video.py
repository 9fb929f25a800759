"""MAGVIT-v2's video tokenizer: 17 × 128 × 128 pixels to 5 × 16 × 16 codes of 2^18, W.A.L.T's latents with another head.

    python -m walt_jax.main --config=configs/magvit2_video.py --config.data.source=FOLDER --workdir=runs/magvit2
    python -m walt_jax.main --workdir=runs/magvit2 --mode=evaluate --protocol=rfvd_ucf --reference=UCF101

Architecture, losses and optimizer are the paper's, with W.A.L.T's 270,000 steps of 256 clips on Kinetics-600; many
accelerators are needed. The paper reports a reconstruction FVD of 8.62 on UCF-101 (its table 5c). Encoder and decoder
have 336M parameters, the image tokenizer that they are inflated from 105M, the discriminator 64M. Chosen here, because
no paper states them: the warm-up, the share of images, the length of the image stage, LFQ's temperature.

The paper's perceptual loss is off, because it needs the weights of a feature network. To use it:
`--config.losses.perceptual=0.1 --config.losses.perceptual_weights=FILE`, see walt_jax/tokenizer/perceptual.py.

W.A.L.T's continuous latents: `--config.tokenizer.head.name=continuous --config.tokenizer.head.groups=1
--config.tokenizer.latent_channels=8`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other `magvit2_*.py` change some."""
    optimizer = {
        "name": "adamw",
        "learning_rate": 1e-4,
        "warmup_steps": 5000,
        "final_fraction": 0.0,
        "b1": 0.0,
        "b2": 0.99,
        "clip_norm": 1e9,  # the papers clip nothing
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
                "cache_bytes": 2**30,
                "max_bad_fraction": 0.05,
            },
            "tokenizer": {
                "latent_channels": 18,
                "base_channels": 128,
                "channel_multipliers": (1, 2, 2, 4),
                "downsample": ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
                "residual_blocks": 4,
                "norm_groups": 32,
                "patch_size": 1,
                "taps": 3,
                "head": {"name": "lfq", "groups": 2, "temperature": 0.01},
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
            "stages": ConfigDict(
                {
                    "images": {
                        "task": "tokenizer",
                        "steps": 100_000,
                        "batch_size": 256,
                        "shapes": {"image": {"frames": 1}},
                        "ema_decay": 0.999,
                        "log_every": 100,
                        "checkpoint_every": 5000,
                        "optimizer": dict(optimizer),
                    },
                    "video": {
                        "task": "tokenizer",
                        "steps": 270_000,
                        "batch_size": 256,
                        "shapes": {"video": {"weight": 4.0}, "image": {"frames": 1, "weight": 1.0}},
                        "ema_decay": 0.999,
                        "log_every": 100,
                        "checkpoint_every": 5000,
                        "optimizer": dict(optimizer),
                    },
                },
                sort_keys=False,
            ),
            "evaluation": {
                "clips": 256,
                "perceptual_weights": "",
                "seed": 1234,
                "distances": ("fvd_tf1",),
                "protocols": ("rfvd_ucf",),
            },
        }
    )
