"""`magvit2_video.py` on 17 × 256 × 448 pixels, to 5 × 32 × 56 latents: what W.A.L.T's second stage works on.

    python -m walt_jax.main --config=configs/magvit2_video_256x448.py --config.data.source=FOLDER --workdir=runs/hd

W.A.L.T trains this size for 1,000,000 steps of 256 clips (its table 8). The first stages here are on 128 × 128; the
last continues from them on both sizes and on images.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "magvit2_video")
    config.data.update(height=256, width=448)
    small = {"height": 128, "width": 128}
    config.stages.images.shapes = {"image": {"frames": 1, **small}}
    config.stages.video.shapes = {"video": {"weight": 4.0, **small}, "image": {"frames": 1, "weight": 1.0, **small}}
    config.stages.finetune = {**config.stages.video.to_dict(), "steps": 1_000_000}
    config.stages.finetune.shapes = {
        "large": {"weight": 2.0},
        "small": {"weight": 1.0, **small},
        "image": {"frames": 1, "weight": 1.0},
    }
    config.evaluation.protocols = ()
    return config
