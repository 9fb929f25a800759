"""DiT-XL/2, class-conditional images of 256 × 256 pixels (Peebles and Xie 2022): ImageNet in the paper.

    python -m walt_jax.main --config=configs/dit_xl_2.py --config.data.source=FOLDER --workdir=runs/dit_xl_2

675M parameters, 118.6 billion multiplications and additions forward. After 400,000 steps of 256 images the paper has
an FID of 19.47, of 9.62 after 7 million, and with guidance of 1.5 on three of four channels, 2.27. Its latents are
those of Stable Diffusion's autoencoder, ours those of an image tokenizer of the same shape, 32 × 32 × 4. Not run here.

What the paper compares: `--config.denoiser.gates=False` is adaLN without zero; `condition_by="tokens"` or `"cross"`,
with `adaln="none"`, in-context and cross-attention conditioning.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The knobs; the other siblings of DiT change some."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_l_imagenet.py")))["get_config"]()
    config.tokenizer.latent_channels = 4
    config.denoiser = ConfigDict(
        {
            "dim": 1152,
            "heads": 16,
            "layers": 28,
            "windows": ((None, None, None),),
            "patch_size": (1, 2, 2),
            "adaln": "separate",
            "positions": "sincos",
            "relative": "none",
            "qk_norm": False,
            "attention_bias": "all",
            "cross_attention": False,
            "classes": 1000,
            "self_conditioning": False,
            "learned_sigma": True,
            "scan": True,
            "remat": "dots",
            "dtype": "bfloat16",
        }
    )
    config.diffusion = ConfigDict(
        {
            "schedule": {"name": "linear", "zero_terminal_snr": False},
            "parameterization": "eps",
            "self_conditioning": 0.0,
        }
    )
    config.stages.denoiser.update(steps=400_000, batch_size=256, ema_decay=0.9999)
    config.stages.denoiser.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-4,
        "warmup_steps": 1,
        "final_fraction": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
    }
    config.sampling = ConfigDict(
        {"sampler": "ddpm", "steps": 250, "guidance": {"scale": 1.5, "channels": 3}, "batch_size": 16}
    )
    return config
