"""W.A.L.T's first super-resolution stage: 17 × 128 × 224 pixels to 17 × 256 × 448, from text, 1.3B parameters.

    python -m walt_jax.main --config=configs/walt_sr_2x.py --config.data.source=FOLDER --workdir=runs/walt_sr_2x

The low-resolution clip is encoded by the tokenizer of the base run, `config.low_res_from`. Its latents, with noise of a
level that the model is conditioned on, are upscaled by a convolution and concatenated with the noisy latents along
channels. 675,000 steps of 512 clips (table 8). The paper does not state how the two are joined and how much noise there
is (up to t = 0.3 here). Not run here.

Each clip is encoded once, before the denoiser's first step, at both resolutions: 358 GB of latents per million clips,
and 4 kB a text token for the captions' embeddings, at most 262 GB per million (`walt_l.py` says more).
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(height=256, width=448, fps=8.0, captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(
        dim=1408,
        layers=40,
        windows=((1, 16, 28), (5, 8, 14)),
        patch_size=(1, 2, 2),
        cross_attention=True,
        classes=0,
        upscale=2,
        remat="block",
    )
    config.low_res_from = "runs/walt_l_t2v"
    config.conditioning = {"low_res_noise": 0.3}
    config.stages.denoiser.update(steps=675_000, batch_size=512, ema_decay=0.0, cached_clips=None)
    config.stages.denoiser.optimizer = {"name": "adafactor", "learning_rate": 5e-4, "warmup_steps": 5000}
    config.sampling.guidance.scale = 7.5
    config.evaluation.protocols = ()
    return config
