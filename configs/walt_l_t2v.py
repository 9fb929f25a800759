"""W.A.L.T-L from text: 17 × 128 × 128 pixels, 419M parameters; zero-shot UCF-101 in the paper, IS 31.7, FVD 344.5.

    python -m walt_jax.main --config=configs/walt_l_t2v.py --config.data.source=FOLDER --workdir=runs/walt_l_t2v

Clips of 8 frames a second and images are trained in one run, in batches of either; `FOLDER` holds both, with captions.
The paper uses 970M captioned images and 89M captioned clips. In windows that span time, tokens of images see only
themselves; cross-attention is spatial, so that both share it.

Captions are read by the published T5-XL, which is not trained: put google/t5-v1_1-xl, as transformers writes it, into a
folder `t5-v1_1-xl` (`docs/denoiser.md`). `--config.text.pretrained=` trains an encoder of `config.text.encoder`'s shape
together with the denoiser instead; make it smaller.

Each clip and image is encoded once, before the denoiser's first step: 25 GB of latents per million (41 GB of clips, 8
GB of images), and 4 kB a text token for the captions' embeddings, at most 262 GB per million (`walt_l.py` says more).

Chosen here, because the paper does not state them: steps (its 3B model's), guidance, the share of images. Not run here.
"""

from ml_collections import ConfigDict

from walt_jax.config_file import parent


def get_config() -> ConfigDict:
    config = parent(__file__, "walt_l")
    config.data.update(fps=8.0, captions="caption")
    config.text = {
        "vocab_size": 32_128,
        "length": 64,
        "encoder": {"dim": 2048, "layers": 24, "heads": 32, "head_dim": 64, "mlp_dim": 5120, "dtype": "bfloat16"},
        "pretrained": "t5-v1_1-xl",
    }
    config.denoiser.update(cross_attention=True, classes=0)
    config.stages.denoiser.update(steps=550_000, batch_size=512, cached_clips=None)
    config.stages.denoiser.shapes = {"clip": {"weight": 1.0}, "image": {"frames": 1, "weight": 1.0}}
    config.sampling.guidance.scale = 7.5
    config.evaluation.protocols = ()
    return config
