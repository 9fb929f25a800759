"""A small MAGVIT-v2 tokenizer of your own folder of clips, alone: reconstruction, on a laptop.

    python -m walt_jax.main --config=configs/tokenizer_clips.py --config.data.source=FOLDER --workdir=runs/tokenizer
    python -m walt_jax.main --workdir=runs/tokenizer --mode=reconstruct --video=IN --out=OUT.mp4

It starts as a cosine transform of blocks (`tokenizer.block_transform`), which the convolutions improve on: held-out
clips of a folder of 40 very different ones have 25.7 dB before the first step and 26.4 dB after 780 (continuous).

Heads: `--config.tokenizer.head.name=fsq` and so on; `docs/tokenizer.md` compares them.
"""

from ml_collections import ConfigDict

# What each head needs beside its name, at about the same number of bits a latent.
HEADS = {
    "continuous": {"latent_channels": 16, "head": {"name": "continuous"}},
    "kl": {"latent_channels": 16, "head": {"name": "kl"}},
    "lfq": {"latent_channels": 18, "head": {"name": "lfq", "groups": 2, "temperature": 1.0}},
    "fsq": {"latent_channels": 6, "head": {"name": "fsq", "levels": (8, 8, 8, 8, 8, 8)}},
    "vq": {"latent_channels": 8, "head": {"name": "vq", "codes": 1024, "decay": 0.99}},
}


def get_config(head: str = "continuous") -> ConfigDict:
    """`--config=configs/tokenizer_clips.py:fsq` chooses the head."""
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
                "base_channels": 32,
                "channel_multipliers": (1, 2, 2),
                "downsample": ((2, 2, 2), (2, 2, 2)),
                "residual_blocks": 1,
                "norm_groups": 8,
                "patch_size": 2,
                "block_transform": True,
                "dtype": "float32",
                **HEADS[head],
            },
            "losses": {"reconstruction": 1.0, "commitment": 0.05, "entropy": 0.02},
            "stages": ConfigDict(
                {
                    "video": {
                        "task": "tokenizer",
                        "steps": 1500,
                        "batch_size": 2,
                        "ema_decay": 0.98,
                        "log_every": 10,
                        "checkpoint_every": 300,
                        "optimizer": {
                            "name": "muon",
                            "learning_rate": 2e-3,
                            "muon_learning_rate": 0.02,
                            "warmup_steps": 50,
                            "final_fraction": 0.02,
                        },
                    },
                }
            ),
            "evaluation": {"clips": 64},
        }
    )
