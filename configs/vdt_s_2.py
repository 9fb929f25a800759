"""VDT-S/2, see `vdt_l_2.py` (Lu et al. 2023). Not run here.

python -m walt_jax.main --config=configs/vdt_s_2.py --config.data.source=FOLDER --workdir=runs/vdt
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent

# In fifteenths of the clips: 3 with rectangles, 2 with each other kind and 2 with nothing observed.
KINDS = ("rectangles",) * 3 + ("start", "end", "every", "one", "random") * 2


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    sizes = {"dim": 384, "heads": 6, "layers": 12, "patch_size": (1, 2, 2)}
    config.denoiser = {
        "block": "vdt",
        **sizes,
        "cross_attention": False,
        "classes": 101,
        "frame_prediction": True,
        "scan": True,
        "remat": "dots",
        "dtype": "bfloat16",
    }
    config.conditioning = ConfigDict({"kinds": KINDS, "frames": (8,), "probability": 13 / 15})
    return config
