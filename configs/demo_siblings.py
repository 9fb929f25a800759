"""W.A.L.T and its siblings on the demo's data: about as many parameters, as long a time, one tokenizer.

    python -m walt_jax.main --config=configs/demo_siblings.py:uvit --workdir=runs/uvit
    python benchmarks/trends.py --config=configs/demo_siblings.py --workdir=runs/siblings  # all, and the table

All read captions with the demo's small text encoder; widths are chosen for equal parameters.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

FRAME, TIME, ALL = (1, None, None), (None, 1, 1), (None, None, None)
DIT = {"adaln": "separate", "cross_keys": "text", "positions": "sincos", "relative": "none", "qk_norm": False}
PLAIN = {**DIT, "attention_bias": "all", "self_conditioning": False}

# What each changes of the denoiser of `walt_trends.py`'s base, which is W.A.L.T.
DENOISERS = {
    "walt": {},
    "joint": {**PLAIN, "windows": (ALL,), "dim": 116, "positions": "fractional", "relative": "rotary"},
    "dit": {**PLAIN, "windows": (ALL,), "dim": 116},
    "uvit": {
        "windows": (ALL,),
        "dim": 136,
        "layers": 5,
        "adaln": "none",
        "condition_by": "tokens",
        "cross_attention": False,
        "cross_keys": "joint",
        "relative": "none",
        "qk_norm": False,
        "attention_bias": "out",
        "self_conditioning": False,
        "skips": True,
    },
    "latte_1": {**PLAIN, "dim": 116, "windows": (FRAME, TIME)},
    "latte_2": {**PLAIN, "dim": 116, "windows": (FRAME, FRAME, TIME, TIME)},
    "latte_3": {**PLAIN, "dim": 104, "windows": (FRAME, TIME), "split": "attentions"},
    "latte_4": {**PLAIN, "dim": 116, "windows": (FRAME, TIME), "split": "heads"},
    "vdt": {**PLAIN, "dim": 104, "windows": (TIME, FRAME), "split": "attentions", "modulated": "last"},
    "stdit": {**PLAIN, "dim": 116, "windows": (FRAME, TIME), "split": "attentions", "adaln": "single"},
    "axial": {"windows": (TIME, (1, None, 1), (1, 1, None)), "layers": 6, "dim": 108},
    "hierarchical": {"windows": (ALL, (None, 2, 2))},
}
VARIANTS = tuple(DENOISERS)
EQUAL_TIME = frozenset(VARIANTS) - {"walt"}


def get_config(variant: str = "walt") -> ConfigDict:
    """`--config=configs/demo_siblings.py:VARIANT`, one of `VARIANTS`."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("walt_trends.py")))["get_config"]()
    config.denoiser.update(DENOISERS[variant])
    if not config.denoiser.get("self_conditioning", True):
        config.diffusion.self_conditioning = 0.0
    return config
