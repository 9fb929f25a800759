"""The demo on clips four times as long, five latent frames at once with gaps between them (FDM, Harvey et al. 2022).

    python -m walt_jax.main --config=configs/walt_demo_long.py --config.tokenizer_from=runs/demo \
      --config.init_from=runs/demo --workdir=runs/demo_long

Clips have 65 frames, 17 latent frames; the model never sees more than 5 of them, as near or as far from each other as
chance has it, and is conditioned on some. `--schedule=hierarchy-2` then makes key frames over the whole video and
fills in between; `docs/generation.md` compares schedules.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    """The knobs."""
    config = parent(__file__, "walt_demo")
    config.data.frames = 65
    config.tokenizer_from = ""
    config.init_from = ""
    config.stages.tokenizer.shapes = {"short": {"frames": 17}}
    config.conditioning.update(kinds=("groups",), probability=0.9)
    config.stages.denoiser.update(
        steps=1200,
        shapes={"clip": {}},
        pack={"tokens": 640, "clips": 32, "frames": 5},
        batch_size=2,
        cached_clips=1024,
    )
    config.sampling.schedule = "hierarchy-2"
    config.evaluation.update(clips=8, samples_per_prompt=1)
    return config
