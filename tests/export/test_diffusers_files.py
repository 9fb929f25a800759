"""The config.json of diffusers' classes; `tests/test_published.py` compares the weights."""

import pytest
from ml_collections import ConfigDict

from walt_jax.config import build, plain
from walt_jax.config_file import PACKAGE, parent
from walt_jax.errors import UserError
from walt_jax.export.diffusers_files import transformer_config
from walt_jax.training.run_config import RunConfig

ENCODER = {"dim": 4096, "layers": 24, "heads": 64, "head_dim": 64, "mlp_dim": 10240}


def config(name: str, **denoiser) -> RunConfig:
    knobs = parent(str(PACKAGE.parent / "configs" / "x.py"), name)
    knobs.denoiser.update(denoiser)
    knobs.data.source = "drawn" if name.startswith("walt") else "clips"
    if denoiser.get("cross_attention"):
        knobs.text = ConfigDict({"vocab_size": 32128, "length": 120, "encoder": ENCODER})
        knobs.denoiser.classes = 0
    return build(RunConfig, plain(knobs, "config"), "config")


def test_dit():
    """The sizes of DiT-XL/2."""
    found = transformer_config(config("dit_xl_2", time_frequencies="diffusers"))
    wanted = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
    wanted |= {"num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}
    assert found["_class_name"] == "DiTTransformer2DModel" and wanted.items() <= found.items()


def test_latte():
    """Its spatial and temporal blocks are counted in pairs."""
    found = transformer_config(config("latte_xl_2_v1", cross_attention=True))
    wanted = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
    wanted |= {"num_layers": 14, "sample_size": 32, "patch_size": 2, "video_length": 16, "caption_channels": 4096}
    wanted |= {"cross_attention_dim": 1152, "norm_type": "ada_norm_single", "attention_bias": True}
    assert found["_class_name"] == "LatteTransformer3DModel" and wanted.items() <= found.items()


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("dit_xl_2", {}, "time_frequencies='diffusers'"),
        ("latte_xl_2_v1", {}, "Latte with text"),
        ("walt_tiny", {}, "Latte with text"),
        ("dit_xl_2", {"time_frequencies": "diffusers", "relative": "rotary"}, "denoiser.relative as 'none'"),
        ("dit_xl_2", {"time_frequencies": "diffusers", "mlp_ratio": 2.0}, "denoiser.mlp_ratio as 4.0"),
        ("dit_xl_2", {"time_frequencies": "diffusers", "conditioning": "adaln"}, "denoiser.conditioning"),
        ("latte_xl_2_v1", {"cross_attention": True, "windows": ((None, 1, 1), (1, None, None))}, "denoiser.windows"),
    ],
)
def test_what_the_classes_compute_otherwise(name, knobs, words):
    with pytest.raises(UserError, match=words):
        transformer_config(config(name, **knobs))
