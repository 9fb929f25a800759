"""The demo's denoiser as a flow model, from the trained demo: the start of `walt_demo_alpha_flow.py`.

    python -m walt_jax.main --config=configs/walt_demo_flow.py --workdir=runs/demo_flow

It takes the demo's tokenizer, and its denoiser's parameters but for the input layer: without self-conditioning the
input is narrower.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_demo")
    config.tokenizer_from = config.init_from = "runs/demo"
    config.denoiser.self_conditioning = False
    config.diffusion = {
        "schedule": {"name": "flow"},
        "parameterization": "flow",
        "times": {"name": "logit_normal", "mean": 0.25},
    }
    del config.stages["tokenizer"]
    config.stages.denoiser.update(steps=700, cached_clips=2048)
    return config
