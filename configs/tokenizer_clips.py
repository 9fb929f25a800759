"""A small MAGVIT-v2 tokenizer of your own folder of clips, without a denoiser: reconstruction, on a laptop.

    python -m walt_jax.main --config=configs/tokenizer_clips.py --config.data.source=FOLDER --workdir=runs/tokenizer
    python -m walt_jax.main --workdir=runs/tokenizer --mode=reconstruct --video=IN --out=OUT.mp4

17 × 64 × 64 pixels become 5 × 8 × 8 latents. Training starts from the principal components of blocks
(`tokenizer.block_transform`), which the convolutions improve. `docs/tokenizer.md` has the measured figures.

Heads: `--config=configs/tokenizer_clips.py:fsq` and so on.
"""

from ml_collections import ConfigDict

# The tokenizer's knobs that depend on the head. "lfq" and "fsq" have 18 bits a position, most for the first components.
HEADS = {
    "continuous": {"latent_channels": 16, "head": {"name": "continuous"}},
    "kl": {"latent_channels": 16, "head": {"name": "kl"}},
    "lfq": {
        "latent_channels": 18,
        "head": {"name": "lfq", "groups": 2, "temperature": 1.0},
        "block_bits": (4, 3, 3, 3, 3, 2),
    },
    "fsq": {"latent_channels": 6, "head": {"name": "fsq", "levels": (16, 8, 8, 8, 8, 4)}},
    "vq": {"latent_channels": 8, "head": {"name": "vq", "codes": 1024, "decay": 0.99}},
}

# Penalties, relative to the logarithm of the error. "lfq" needs none: they would undo the codes that it starts with.
LOSSES = {
    "lfq": {"commitment": 0.0, "entropy": 0.0},
    "vq": {"commitment": 0.05},
    "kl": {"kl": 1e-4},
}

# (steps, peak learning rate). The signs of "lfq" have no slope, and long training undoes more than it improves.
TRAINING = {"lfq": (300, 1e-5)}


def get_config(head: str = "continuous") -> ConfigDict:
    """`--config=configs/tokenizer_clips.py:fsq` chooses the head."""
    steps, learning_rate = TRAINING.get(head, (1500, 5e-4))
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "source": "",
                "frames": 17,
                "height": 64,
                "width": 64,
                "fps": 8.0,
                "cache_bytes": 2**30,
                "max_bad_fraction": 0.2,
            },
            "tokenizer": {
                "base_channels": 64,
                "channel_multipliers": (1, 1, 1),
                "downsample": ((2, 1, 1), (2, 1, 1)),
                "residual_blocks": 1,
                "norm_groups": 8,
                "patch_size": 8,
                "block_transform": True,
                "dtype": "float32",
                **HEADS[head],
            },
            "losses": {"reconstruction": 1.0, "log_error": True, **LOSSES.get(head, {})},
            "stages": ConfigDict(
                {
                    "video": {
                        "task": "tokenizer",
                        "steps": steps,
                        "batch_size": 4,
                        "ema_decay": 0.98,
                        "log_every": 10,
                        "checkpoint_every": 300,
                        "optimizer": {
                            "name": "adamw",
                            "learning_rate": learning_rate,
                            "warmup_steps": 50,
                            "final_fraction": 0.02,
                        },
                    },
                }
            ),
            "evaluation": {"clips": 64},
        }
    )
