"""VDT-L/2: temporal attention, then spatial attention with adaLN-Zero, in each block (Lu et al. 2023).

    python -m walt_jax.main --config=configs/vdt_l_2.py --config.data.source=FOLDER --workdir=runs/vdt

Video of 16 × 256 × 256 pixels. Observed latents take the place of noisy ones, and all tasks are masks: a fifth of the
clips have rectangles in space to be generated; the others, each as often, no frame observed, the first or last 8, every
fourth, one, or each with probability 0.2. An FVD of 225.7 on UCF-101 in the paper. Its "L/2" has the width and depth of
DiT-XL. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent

# In fifteenths of the clips: 3 with rectangles, 2 with each other kind and 2 with nothing observed.
KINDS = ("rectangles",) * 3 + ("start", "end", "every", "one", "random") * 2


def get_config() -> ConfigDict:
    config = parent(__file__, "latte_xl_2_v1")
    sizes = {"dim": 1152, "heads": 16, "layers": 28, "patch_size": (1, 2, 2)}
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
