"""W.A.L.T-L on images of 256 × 256 pixels with class labels: ImageNet in the paper (tables 2 and 8).

    python -m walt_jax.main --config=configs/walt_l_imagenet.py --config.data.source=FOLDER --workdir=runs/imagenet
    python -m walt_jax.main --workdir=runs/imagenet --mode=evaluate --protocol=imagenet_50k \\
        --weights=inception=pt_inception-2015-12-05-6726825d.pth

The denoiser has 460M parameters, because each block has its own modulation layer here. The paper reaches an FID of 2.56
(IS 215.1) after 437,000 steps of 1,024 images, and 2.40 (290.5) with MDT's power-cosine guidance. It does not state the
guidance's scale and power (MDT's here) or the windows (frames and 16 × 16 here). Not run here.

Each image is encoded once, before the denoiser's first step: 33 GB of latents per million images (`walt_l.py` says
more). `--config.stages.denoiser.cached_clips=N` draws crops anew for each further epoch of N.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(frames=1, height=256, width=256)
    config.tokenizer.update(channel_multipliers=(1, 1, 2, 4), downsample=((1, 2, 2),) * 3, taps=1)
    config.denoiser.update(windows=((1, None, None), (1, 16, 16)), adaln_rank=None, classes=1000, isolate_images=False)
    images = {**config.stages.images.to_dict(), "steps": 1_351_000, "shapes": {}}
    config.stages = ConfigDict({"images": images, "denoiser": config.stages.denoiser}, sort_keys=False)
    config.stages.denoiser.update(steps=437_000, batch_size=1024, cached_clips=None)
    config.sampling.guidance = {"scale": 3.8, "kind": "power_cosine", "power": 4.0}
    config.evaluation.protocols = ("imagenet_50k",)
    return config
