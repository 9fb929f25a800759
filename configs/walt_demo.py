"""The demo: captioned drawn shapes in, video from prompts out, both models trained from scratch.

    python -m walt_jax.main --config=configs/walt_demo.py --workdir=runs/demo

On two CPU cores that other programs used too (JAX 0.10.2): 31 minutes; 29.7 dB on unseen clips; 98 % of 126 samples of
trained combinations and all of 18 of others have colour, shape and direction right.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; `walt_tiny.py` and `walt_clips.py` change some."""
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "source": "drawn",
                "frames": 17,
                "height": 32,
                "width": 32,
                "fps": 8.0,
                "cache_bytes": 2**30,
                "max_bad_fraction": 0.0,
                "caption_dropout": 0.1,
            },
            "text": {
                "vocab_size": 512,
                "length": 16,
                "encoder": {"dim": 64, "layers": 1, "heads": 4, "head_dim": 16, "mlp_dim": 128},
            },
            "tokenizer": {
                "latent_channels": 12,
                "base_channels": 32,
                "channel_multipliers": (1, 2, 2),
                "downsample": ((2, 2, 2), (2, 1, 1)),
                "residual_blocks": 1,
                "norm_groups": 8,
                "patch_size": 2,
                "dtype": "float32",
            },
            "denoiser": {
                "dim": 192,
                "heads": 3,
                "layers": 6,
                # The grid is 5 × 4 × 4 tokens, which is the paper's spatiotemporal window.
                "windows": ((1, None, None), (None, 4, 4)),
                "positions": "fractional",
                "relative": "rotary",
                "patch_size": (1, 2, 2),
                "self_conditioning": True,
                "scan": False,
                "dtype": "float32",
            },
            "diffusion": {"schedule": {"name": "linear", "zero_terminal_snr": False}, "self_conditioning": 0.9},
            "stages": ConfigDict(
                {
                    "tokenizer": {
                        "task": "tokenizer",
                        "steps": 1100,
                        "batch_size": 4,
                        "ema_decay": 0.98,
                        "log_every": 10,
                        "checkpoint_every": 300,
                        "preview_every": 200,
                        "optimizer": {
                            "name": "muon",
                            "learning_rate": 2e-3,
                            "muon_learning_rate": 0.02,
                            "warmup_steps": 50,
                            "final_fraction": 0.02,
                        },
                    },
                    "denoiser": {
                        "task": "denoiser",
                        "steps": 800,
                        "batch_size": 32,
                        "ema_decay": 0.99,
                        "log_every": 10,
                        "checkpoint_every": 300,
                        "preview_every": 200,
                        "cached_clips": 4096,
                        "optimizer": {
                            "name": "muon",
                            "learning_rate": 2e-3,
                            "muon_learning_rate": 0.02,
                            "warmup_steps": 100,
                            "final_fraction": 0.02,
                        },
                    },
                },
                sort_keys=False,
            ),
            "sampling": {"steps": 25, "guidance": {"scale": 2.0}, "batch_size": 8},
            "evaluation": {"clips": 72, "samples_per_prompt": 2},
        },
        sort_keys=False,
    )
