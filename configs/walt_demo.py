"""The demo: captioned drawn shapes in, video from prompts out, both models trained from scratch.

    python -m walt_jax.main --config=configs/walt_demo.py --workdir=runs/demo

Measured in one run on two CPU cores held to the speed of a 2048³ product at 135 GFLOP/s, JAX 0.10.2, nothing compiled
before: 15.9 minutes; unseen clips are reconstructed at 28.2 dB; of the samples all of 126 of trained combinations and
18 of 18 of others have colour, shape and direction right.
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
                "downsample": ((2, 1, 1), (2, 1, 1)),
                "residual_blocks": 1,
                "norm_groups": 8,
                "patch_size": 4,
                "dtype": "float32",
            },
            "losses": {"log_error": True},
            "denoiser": {
                "dim": 128,
                "heads": 2,
                "layers": 4,
                # The grid is 5 × 4 × 4 tokens, which is the paper's spatiotemporal window.
                "windows": ((1, None, None), (None, 4, 4)),
                "positions": "fractional",
                "relative": "rotary",
                "patch_size": (1, 2, 2),
                "self_conditioning": True,
                "frame_prediction": True,
                "scan": False,
                "dtype": "float32",
            },
            # Every way of asking is drawn: most clips have a caption alone.
            "conditioning": {
                "frames": (1, 2),
                "probability": 0.3,
                "kinds": ("start", "start", "end", "ends", "one", "random", "rectangles", "inside"),
            },
            "diffusion": {
                "schedule": {"name": "linear", "zero_terminal_snr": False},
                # Of uniform times half are almost pure noise, and few are where a caption decides on the shape.
                "times": {"name": "logit_normal", "mean": 0.25, "std": 0.8},
                "self_conditioning": 0.9,
            },
            "stages": ConfigDict(
                {
                    "tokenizer": {
                        "task": "tokenizer",
                        "steps": 920,
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
                        "steps": 1600,
                        "batch_size": 16,
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
