"""`walt_demo.py` shrunk to under a minute on two CPU cores, for tests: every step is logged, nothing is learned.

python -m walt_jax.main --config=configs/walt_tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_demo")
    config.data.update(frames=5, height=16, width=16)
    config.text.encoder.update(dim=16, heads=2, head_dim=8, mlp_dim=16)
    config.tokenizer.update(base_channels=8, channel_multipliers=(1, 1, 2), norm_groups=4)
    config.denoiser.update(dim=32, heads=2, layers=2, windows=((1, None, None), (None, 1, 1)))
    config.stages.tokenizer.update(steps=30, batch_size=2, log_every=1, checkpoint_every=8)
    config.stages.denoiser.update(steps=30, batch_size=4, cached_clips=32, log_every=1, checkpoint_every=8)
    config.sampling.update(steps=2)
    config.evaluation.update(clips=8, samples_per_prompt=1)
    return config
