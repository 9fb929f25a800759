"""W.A.L.T on your own folder of captioned clips, both models trained from scratch.

    python -m walt_jax.main --config=configs/walt_clips.py --config.data.source=FOLDER --workdir=runs/clips

The folder holds videos (mp4, webm, mov, avi, gif) and, for captions, a `metadata.csv` with the columns `file_name` and
`caption`; without one the model is unconditional.

Expect little of a laptop: on 48 clips and two CPU cores, in 17 minutes and 2.4 GB, held-out clips were reconstructed at
23.1 dB (SSIM 0.76), soft and a little pale; samples have the colours and the light of scenes, but no shapes yet.
That was with the squared error as the tokenizer's loss, and uniform diffusion times.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_demo")
    config.data.update(source="", frames=17, height=48, width=80)
    config.text.update(vocab_size=1024, length=32)
    config.tokenizer.update(downsample=((2, 2, 2), (2, 1, 1)), patch_size=2)
    config.denoiser.update(dim=192, heads=3, layers=6, windows=((1, None, None), (None, 3, 5)))
    config.stages.tokenizer.update(steps=1300, batch_size=2)
    config.stages.denoiser.update(steps=600, batch_size=8, cached_clips=512)
    config.evaluation.update(clips=16, samples_per_prompt=1, prompts=8)
    return config
