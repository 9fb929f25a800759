"""The demo distilled to few sampling steps, each of one evaluation (progressive distillation, Salimans and Ho 2022).

    python -m walt_jax.main --config=configs/walt_demo_few_steps.py:4 --workdir=runs/demo_4_steps
    python -m walt_jax.main --config=configs/walt_demo_few_steps.py:1 --workdir=runs/demo_1_step

The first starts from the trained demo in `runs/demo`, whose teacher takes 16 guided steps, makes one of 8 steps, then
one of 4; the second starts from it and makes one of 2 steps, then one of 1. Learning rates are low: at the demo's own
the student forgets more than it learns. Measured: `docs/sampling.md`.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent

VARIANTS = {"4": ("runs/demo", (8, 4)), "1": ("runs/demo_4_steps", (2, 1))}


def get_config(variant: str = "4") -> ConfigDict:
    """`--config=configs/walt_demo_few_steps.py:VARIANT`, one of `VARIANTS`."""
    config, (source, halvings) = parent(__file__, "walt_demo"), VARIANTS[variant]
    config.tokenizer_from, config.init_from = "runs/demo", source
    trained = config.stages.denoiser
    config.stages = ConfigDict(sort_keys=False)
    # All of a sampler's steps count alike: of the demo's own times one in seven would be the first step.
    config.diffusion.times = ConfigDict({"name": "uniform"})
    for steps in halvings:
        stage = ConfigDict(trained.to_dict())
        stage.update(steps=500, cached_clips=2048, checkpoint_every=100)
        stage.optimizer.update(learning_rate=4e-4, muon_learning_rate=0.004, warmup_steps=10)
        stage.distillation = {"steps": steps}
        if source == "runs/demo" and steps == halvings[0]:
            stage.distillation.guidance = config.sampling.guidance
        config.stages[f"steps_{steps}"] = stage
    config.sampling = {"steps": halvings[-1], "batch_size": 8}
    return config
