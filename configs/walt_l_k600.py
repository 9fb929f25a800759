"""W.A.L.T-L for frame prediction: 5 frames are observed, 12 predicted; Kinetics-600 in the paper, FVD 3.3 ± 0.0.

    python -m walt_jax.main --config=configs/walt_l_k600.py --config.data.source=FOLDER --workdir=runs/k600
    python -m walt_jax.main --workdir=runs/k600 --mode=evaluate --protocol=k600_walt

Two observed latent frames are concatenated with the noisy ones along channels, together with a mask. The paper trains
for 360 epochs in batches of 512 (about 275,000 steps of Kinetics-600's 392,000 clips) and does not state how often
frames are observed: 0.9 here, so that guidance on them is possible. Not run here.

Before the denoiser's first step, four million clips (ten windows of each clip of Kinetics-600) are encoded: 41 GB of
latents per million clips (`walt_l.py` says more).
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(captions="caption")
    config.denoiser.update(classes=0, frame_prediction=True)
    config.conditioning = {"frames": (2,), "probability": 0.9}
    config.stages.denoiser.update(steps=275_000, batch_size=512, cached_clips=4_000_000)
    config.evaluation.protocols = ("k600_walt",)
    return config
