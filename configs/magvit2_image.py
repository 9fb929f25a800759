"""MAGVIT-v2's image tokenizer with W.A.L.T's channels: 256 × 256 pixels to 32 × 32 latents, multipliers 1, 1, 2, 4.

    python -m walt_jax.main --config=configs/magvit2_image.py --config.data.source=FOLDER --workdir=runs/magvit2_image

W.A.L.T trains it for 270 epochs of ImageNet in batches of 256 (its table 8), which are 1,351,000 steps; MAGVIT-v2
reports a reconstruction FID of 1.15 at 128 × 128 (its table 5b).
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "magvit2_video")
    config.data.update(frames=1, height=256, width=256)
    config.tokenizer.update(channel_multipliers=(1, 1, 2, 4), downsample=((1, 2, 2),) * 3, taps=1)
    images = {**config.stages.images.to_dict(), "steps": 1_351_000, "shapes": {}}
    config.stages = ConfigDict({"images": images}, sort_keys=False)
    config.evaluation.update(distances=("fid_tf1",), protocols=())
    return config
