"""W.A.L.T's text-to-video base model, about 3B parameters: zero-shot UCF-101 IS 35.1 and FVD 258.1 in the paper.

    python -m walt_jax.main --config=configs/walt_3b.py --config.data.source=FOLDER --workdir=runs/walt_3b

52 layers, 16 heads (table 8). The table's "hidden size 9216" would give some 70B; as the MLP's, with a width of 1792,
it makes blocks of 3.05B, 3.09B with everything around them. 550,000 steps of 512 clips and images with Adafactor at
2e-4, without an average; then the paper goes on at 5 × 16 × 28 latents. Frames are given to some clips, so that one
model makes video from text and from an image (how often is not stated: a third here). Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(dim=1792, mlp_ratio=9216 / 1792, layers=52, frame_prediction=True, remat="block")
    config.denoiser.update(cross_attention=True, classes=0)
    config.conditioning = {"frames": (1, 2), "probability": 1 / 3}
    config.stages.denoiser.update(steps=550_000, batch_size=512, ema_decay=0.0)
    config.stages.denoiser.optimizer = {"name": "adafactor", "learning_rate": 2e-4, "warmup_steps": 5000}
    config.sampling.guidance.scale = 7.5
    return config
