"""W.A.L.T and its siblings on the demo's data: about as many parameters, as long a time, one tokenizer.

    python -m walt_jax.main --config=configs/demo_siblings.py:uvit --workdir=runs/uvit
    python benchmarks/trends.py --config=configs/demo_siblings.py --workdir=runs/siblings  # all, and the table

All read captions with the demo's small text encoder; widths are chosen for equal parameters.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent

FRAME, TIME, ALL = (1, None, None), (None, 1, 1), (None, None, None)
SIZES = {"heads": 2, "layers": 4, "patch_size": (1, 2, 2)}

DENOISERS = {
    "walt": {"dim": 128, "windows": (FRAME, (None, 2, 2))},
    "joint": {
        "block": "dit",
        "dim": 116,
        "windows": (ALL,),
        "positions": "fractional",
        "relative": "rotary",
        "learned_sigma": False,
    },
    "dit": {"block": "dit", "dim": 116, "windows": (ALL,), "learned_sigma": False},
    "uvit": {"block": "uvit", "dim": 136, "layers": 5, "windows": (ALL,)},
    "latte_1": {"block": "latte", "dim": 116, "windows": (FRAME, TIME), "learned_sigma": False},
    "latte_2": {"block": "latte", "dim": 116, "windows": (FRAME, FRAME, TIME, TIME), "learned_sigma": False},
    "latte_3": {"block": "latte", "dim": 104, "windows": (FRAME, TIME), "split": "attentions", "learned_sigma": False},
    "latte_4": {"block": "latte", "dim": 116, "windows": (FRAME, TIME), "split": "heads", "learned_sigma": False},
    "vdt": {"block": "vdt", "dim": 104, "learned_sigma": False},
    "stdit": {"block": "stdit", "dim": 116, "learned_sigma": False},
    "axial": {"dim": 108, "layers": 6, "windows": (TIME, (1, None, 1), (1, 1, None))},
    "hierarchical": {"dim": 128, "windows": (ALL, (None, 2, 2))},
}
VARIANTS = tuple(DENOISERS)
EQUAL_TIME = frozenset(VARIANTS) - {"walt"}


def get_config(variant: str = "walt") -> ConfigDict:
    """`--config=configs/demo_siblings.py:VARIANT`, one of `VARIANTS`."""
    config = parent(__file__, "walt_demo")
    config.conditioning = {}
    config.denoiser = {**SIZES, **DENOISERS[variant]}
    config.diffusion.self_conditioning = 0.0 if "block" in DENOISERS[variant] else 0.9
    config.normalise_latents = True
    config.diffusion.schedule.zero_terminal_snr = True
    config.diffusion.times = ConfigDict({"name": "uniform"})
    config.stages.denoiser.update(steps=800, batch_size=16, checkpoint_every=400, cached_clips=4096)
    return config
