"""Variants of a smaller `walt_demo.py` that differ in one idea each.

python -m walt_jax.main --config=configs/walt_trends.py:no_self_conditioning --workdir=runs/no_self_conditioning
python benchmarks/trends.py --tokenizer=runs/demo --workdir=runs/trends  # all on one tokenizer, and the table
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent

# What each variant changes of the base.
VARIANTS = {
    "base": {},
    "no_self_conditioning": {"denoiser.self_conditioning": False, "diffusion.self_conditioning": 0.0},
    "no_zero_terminal_snr": {"diffusion.schedule.zero_terminal_snr": False},
    "no_latent_normalisation": {"normalise_latents": False},
    "full_attention": {"denoiser.windows": ((None, None, None), (None, None, None))},
    # As many tokens a step as the base's 16 clips of 80; half of the clips are the base's.
    "packed": {
        "stages.denoiser.shapes": {
            "large": {"weight": 2.0},
            "short": {"frames": 9, "weight": 1.0},
            "small": {"height": 24, "width": 24, "weight": 1.0},
            "image": {"frames": 1, "weight": 1.0},
        },
        "stages.denoiser.pack": {"tokens": 320, "clips": 16},
        "stages.denoiser.batch_size": 4,
    },
}
# These have as long a time as the base, the others as many steps.
EQUAL_TIME = frozenset({"full_attention"})


def get_config(variant: str = "base") -> ConfigDict:
    """`--config=configs/walt_trends.py:VARIANT`, one of `VARIANTS`."""
    config = parent(__file__, "walt_demo")
    config.conditioning = {}
    config.normalise_latents = True
    config.denoiser.update(
        frame_prediction=False,
        dim=128,
        heads=2,
        layers=4,
        windows=((1, None, None), (None, 2, 2)),
        positions="learned",
        relative="bias",
    )
    config.diffusion.schedule.zero_terminal_snr = True
    config.diffusion.times = ConfigDict({"name": "uniform"})
    config.stages.denoiser.update(
        steps=800, batch_size=16, shapes=ConfigDict(), pack=None, checkpoint_every=400, cached_clips=4096
    )
    for name, value in VARIANTS[variant].items():
        *groups, knob = name.split(".")
        group = config
        for name in groups:
            group = group[name]
        group[knob] = ConfigDict(value) if isinstance(value, dict) else value
    return config
