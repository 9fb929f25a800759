"""The demo's cascade: its samples of 32 × 32 become 64 × 64.

    python -m walt_jax.main --config=configs/demo_sr_2x.py --workdir=runs/demo_sr
    python -m walt_jax.main --workdir=runs/demo --mode=sample --cascade=runs/demo_sr --prompt="a blue square moving up"

Super-resolution as W.A.L.T has it: the base run's latents, with noise of a random level, are upscaled by a convolution
and concatenated with the noisy latents. The tokenizer is the demo's, whose convolutions take any size.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    """The knobs."""
    config = parent(__file__, "walt_demo")
    config.tokenizer_from = config.low_res_from = "runs/demo"
    config.data.update(height=64, width=64)
    config.denoiser.update(upscale=2, frame_prediction=False, windows=((1, None, None), (None, 4, 4)))
    config.conditioning = {"low_res_noise": 0.3}
    del config.stages["tokenizer"]
    config.stages.denoiser.update(steps=600, batch_size=8, cached_clips=1024)
    config.stages.denoiser.optimizer.update(warmup_steps=50)
    config.sampling.update(batch_size=4)
    config.evaluation.update(clips=24, samples_per_prompt=1, prompts=24)
    return config
