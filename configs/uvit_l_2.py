"""U-ViT-L/2, class-conditional images of 256 × 256 pixels (Bao et al. 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/uvit_l_2.py --config.data.source=FOLDER --workdir=runs/uvit_l_2

Time, class and patches are all tokens; blocks of the second half get what those of the first had; a convolution comes
last. 287M parameters; an FID of 3.40 in the paper after 300,000 steps of 1,024 images, with guidance. Not run here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other sizes change some."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dit_xl_2.py")))["get_config"]()
    config.denoiser.update(
        dim=1024,
        heads=16,
        layers=21,
        condition_by="tokens",
        adaln="none",
        positions="learned",
        attention_bias="out",
        learned_sigma=False,
        skips=True,
        output_conv=True,
        scan=False,
    )
    config.stages.denoiser.update(steps=300_000, batch_size=1024)
    config.stages.denoiser.optimizer.update(learning_rate=2e-4, b1=0.99, b2=0.99, weight_decay=0.03, warmup_steps=5000)
    config.sampling = ConfigDict({"sampler": "dpm++2m", "steps": 50, "guidance": {"scale": 1.4}, "batch_size": 16})
    return config
