"""W.A.L.T's second super-resolution stage: 17 × 256 × 448 pixels to 17 × 512 × 896, from text, 419M parameters.

    python -m walt_jax.main --config=configs/walt_sr_4x.py --config.data.source=FOLDER --workdir=runs/walt_sr_4x

As `walt_sr_2x.py`, with 24 layers of width 1024 and 275,000 steps (table 8, whose patch of 4 keeps the other stages'
grid of 5 × 16 × 28 tokens; the text says 2). Latents of both resolutions take 1434 GB per million clips, and captions'
embeddings at most 262 GB per million. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(height=512, width=896, fps=8.0, captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(
        dim=1024,
        layers=24,
        windows=((1, 16, 28), (5, 8, 14)),
        patch_size=(1, 4, 4),
        cross_attention=True,
        classes=0,
        upscale=2,
        remat="block",
    )
    config.low_res_from = "runs/walt_sr_2x"
    config.conditioning = {"low_res_noise": 0.3}
    config.stages.denoiser.update(steps=275_000, batch_size=512, ema_decay=0.0, cached_clips=None)
    config.stages.denoiser.optimizer = {"name": "adafactor", "learning_rate": 5e-4, "warmup_steps": 5000}
    config.sampling.guidance.scale = 7.5
    config.evaluation.protocols = ()
    return config
