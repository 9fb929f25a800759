"""W.A.L.T-L from text: 17 × 128 × 128 pixels, 419M parameters; zero-shot UCF-101 in the paper, IS 31.7, FVD 344.5.

    python -m walt_jax.main --config=configs/walt_l_t2v.py --config.data.source=FOLDER --workdir=runs/walt_l_t2v

The paper trains on some 970M captioned images and 89M captioned clips. Captions are read by the published T5-XL,
which is not trained: a folder `t5-v1_1-xl` of the user's, with google/t5-v1_1-xl as transformers writes it
(`docs/denoiser.md` says how). `--config.text.pretrained=` trains an encoder of `config.text.encoder`'s shape along
instead; make it smaller. What the paper doesn't state is chosen here: steps (its 3B model's), guidance. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(cross_attention=True, classes=0)
    config.stages.denoiser.update(steps=550_000, batch_size=512)
    config.sampling.guidance.scale = 7.5
    return config
