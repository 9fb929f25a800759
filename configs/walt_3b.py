"""W.A.L.T's text-to-video base model, 3B parameters, 17 × 128 × 224 pixels: zero-shot UCF-101 IS 35.1 and FVD 258.1.

    python -m walt_jax.main --config=configs/walt_3b.py --config.data.source=FOLDER --workdir=runs/walt_3b

52 layers, 16 heads (table 8). The table's "hidden size 9216" would give some 70B; as the MLP's width, with a width of
1792, it gives blocks of 3.05B, and 3.09B in all. The stage `denoiser` has 550,000 steps of 512 clips and images of
128 × 128 with Adafactor at 2e-4, without EMA. The stage `wide` is the paper's 9:16 fine-tuning (table 6): 5 × 16 × 28
latents, windows of 1 × 16 × 28 and 5 × 8 × 14, both position tables interpolated, 250,000 steps at a constant 5e-5.
Its data, text encoder and image batches are those of `walt_l_t2v.py`. Frames are observed in some clips, so that one
model makes video from text and from an image (how often is not stated: a third here). Not run here.

Each stage encodes each clip and image once, before its first step: 25 GB and 43 GB of latents per million, and at most
262 GB per million of caption embeddings (`walt_l_t2v.py`). On chips of 16 GB, `--config.denoiser.remat=block`.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(width=224, fps=8.0, captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(dim=1792, mlp_ratio=9216 / 1792, layers=52, frame_prediction=True, remat="dots")
    config.denoiser.update(cross_attention=True, classes=0)
    config.conditioning = {"frames": (1, 2), "probability": 1 / 3}
    stages = config.stages
    for stage in (stages.images, stages.video):
        for shape in stage.shapes.values():
            shape.width = 128
    square = {"clip": {"width": 128, "weight": 1.0}, "image": {"frames": 1, "width": 128, "weight": 1.0}}
    stages.denoiser.update(steps=550_000, batch_size=512, ema_decay=0.0, cached_clips=None, shapes=square)
    stages.denoiser.optimizer = {"name": "adafactor", "learning_rate": 2e-4, "warmup_steps": 5000}
    stages.wide = {
        **stages.denoiser.to_dict(),
        "steps": 250_000,
        "shapes": {"clip": {"weight": 1.0}, "image": {"frames": 1, "weight": 1.0}},
        "windows": ((1, 16, 28), (5, 8, 14)),
        "optimizer": {"name": "adafactor", "learning_rate": 5e-5, "final_fraction": 1.0},
    }
    config.sampling.guidance.scale = 7.5
    config.evaluation.protocols = ()
    return config
