"""LoRA on the demo: what your own captioned clips show, learned by a small change of a trained model.

    python -m walt_jax.main --config=configs/walt_lora.py --config.data.source=FOLDER --workdir=runs/lora

The model that is changed is that of `runs/demo`; another one with the same knobs is named by `init_from` and
`tokenizer_from`. For a model with other knobs, start from its own config and set these two and the denoiser
stage's `lora.rank`. The run leaves `pytorch_lora_weights.safetensors`; see `docs/lora.md` for what it took and gave.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_demo")
    config.init_from = config.tokenizer_from = "runs/demo"
    config.data.source = ""
    stage = config.stages.denoiser
    stage.update(steps=300, cached_clips=256, ema_decay=0.98)
    stage.lora = {"rank": 8, "alpha": 16.0}
    stage.optimizer.update(name="adamw", learning_rate=2e-3, warmup_steps=20)
    config.stages = ConfigDict({"lora": stage}, sort_keys=False)
    config.evaluation.update(clips=16, samples_per_prompt=1, prompts=12)
    return config
