"""The demo's flow model made to sample in 1 to 4 evaluations: α-Flow, with guidance's scale and interval as inputs.

    python -m walt_jax.main --config=configs/walt_demo_alpha_flow.py --workdir=runs/demo_alpha_flow

It starts from `walt_demo_flow.py`'s run in `runs/demo_flow` and uses the demo's tokenizer in `runs/demo`.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_demo")
    config.tokenizer_from, config.init_from = "runs/demo", "runs/demo_flow"
    config.denoiser.update(self_conditioning=False, mean_velocity=True)
    config.diffusion = {
        "schedule": {"name": "flow"},
        "parameterization": "flow",
        "times": {"name": "logit_normal", "mean": 0.25, "std": 1.4},
    }
    del config.stages["tokenizer"]
    stage = config.stages.denoiser
    stage.update(steps=700, cached_clips=2048)
    stage.alpha_flow = {"velocity": "model", "alpha": 0.5}
    stage.optimizer.update(learning_rate=4e-4, muon_learning_rate=0.004, warmup_steps=10)
    config.sampling = {"steps": 4, "guidance": {"scale": 2.0}, "batch_size": 8}
    return config
