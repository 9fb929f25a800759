"""The layouts of others: diffusers' folders and the original DiT's and Latte's files, for the models that have them."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from walt_jax.denoiser import published_weights
from walt_jax.errors import UserError
from walt_jax.export.safetensors_files import save
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKLConfig
from walt_jax.tokenizer.autoencoder_kl_weights import DIFFUSERS
from walt_jax.training.run import Run
from walt_jax.training.run_config import RunConfig, read_autoencoder
from walt_jax.workdir import write_atomically

DIT_WINDOWS, LATTE_WINDOWS = ((None, None, None),), ((1, None, None), (None, 1, 1))
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors(run: Run) -> dict[str, np.ndarray]:
    """The trained denoiser with the parameter names of diffusers, or of the original DiT or Latte.

    Raises:
        UserError: if the config is neither DiT nor Latte, or nothing has been trained.
    """
    denoiser = run.config.denoiser
    if denoiser is None:
        raise UserError(
            "This config trains only a tokenizer, which diffusers has no class for; use --format=safetensors or orbax."
        )
    params = run.trained_denoiser()[1]["denoiser"]
    return published_weights.export(jax.device_get(params), denoiser, _of_diffusers(run.config))


def _of_diffusers(config: RunConfig) -> bool:
    return config.denoiser.single or config.denoiser.time_frequencies == "diffusers"


def write(folder: pathlib.Path, run: Run) -> int:
    """Writes `transformer/`, and `vae/` where the tokenizer is a published autoencoder; returns how many parameters.

    Raises:
        UserError: as `tensors`, or if diffusers' classes would compute something else.
    """
    config = run.config
    found = {"transformer": (transformer_config(config), tensors(run))}
    if config.takes_autoencoder:
        model, params = read_autoencoder(config.tokenizer_from)
        found["vae"] = (autoencoder_config(model.config), autoencoder_tensors(params, model.config))
    for name, (knobs, weights) in found.items():
        write_atomically(folder / name / "config.json", json.dumps(knobs, indent=1) + "\n")
        save(folder / name / WEIGHTS, weights, "pt")
    return sum(tensor.size for _, weights in found.values() for tensor in weights.values())


def transformer_config(config: RunConfig) -> dict[str, Any]:
    """The config.json of diffusers' class for a DiT of images, or a Latte of text.

    Raises:
        UserError: if diffusers has no class for it.
    """
    denoiser = config.denoiser
    if denoiser.block not in ("dit", "latte") or not _of_diffusers(config):
        raise UserError(
            "diffusers has classes for DiT with config.denoiser.time_frequencies='diffusers' and for Latte with text, "
            "and this is neither; --format=safetensors and orbax hold any, --out=FILE.safetensors the original layouts."
        )
    frames, height, width, channels = config.tokenizer.latent_shape(
        config.data.frames, config.data.height, config.data.width
    )
    wanted = {
        "denoiser.windows": (denoiser.windows, DIT_WINDOWS if denoiser.block == "dit" else LATTE_WINDOWS),
        "denoiser.split": (denoiser.split, "blocks"),
        "denoiser.positions": (denoiser.positions, "sincos"),
        "denoiser.relative": (denoiser.relative, "none"),
        "denoiser.mlp_ratio": (denoiser.mlp_ratio, 4.0),
        "denoiser.patch_size": (denoiser.patch_size, (1, *denoiser.patch_size[1:2] * 2)),
        "data.frames": (frames, 1 if denoiser.block == "dit" else frames),
        "data.width": (width, height),
    }
    if denoiser.block == "dit":
        wanted["denoiser.conditioning"] = (denoiser.conditioning, "adaln_zero")
    for knob, (value, only) in wanted.items():
        if value != only:
            raise UserError(f"diffusers' class has config.{knob} as {only!r}, not {value!r}; use --format=safetensors.")
    knobs = {
        "num_attention_heads": denoiser.heads,
        "attention_head_dim": denoiser.dim // denoiser.heads,
        "in_channels": channels,
        "out_channels": channels * (2 if denoiser.learned_sigma else 1),
        "sample_size": height,
        "patch_size": denoiser.patch_size[1],
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
        "norm_eps": denoiser.norm_epsilon,
        "dropout": 0.0,
    }
    if denoiser.block == "dit":
        return {
            "_class_name": "DiTTransformer2DModel",
            **knobs,
            "num_layers": denoiser.layers,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": denoiser.classes,
        }
    return {
        "_class_name": "LatteTransformer3DModel",
        **knobs,
        "num_layers": denoiser.layers // 2,
        "norm_type": "ada_norm_single",
        "cross_attention_dim": denoiser.dim,
        "caption_channels": config.text.encoder.dim,
        "video_length": frames,
    }


def autoencoder_config(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The config.json of diffusers' AutoencoderKL."""
    scales = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * scales,
        "up_block_types": ["UpDecoderBlock2D"] * scales,
        "block_out_channels": list(config.block_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
    }


def autoencoder_tensors(params: dict[str, Any], config: AutoencoderKLConfig) -> dict[str, np.ndarray]:
    """The autoencoder's parameters by diffusers' names; the inverse of `autoencoder_kl_weights.load_weights`."""
    found = {}
    for ours, value in flatten_dict(params, sep=".").items():
        name, value = DIFFUSERS.name(ours, len(config.block_channels)), np.asarray(value)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:  # attention has linear layers, all else convolutions of one pixel
            value = value.T if ".attentions." in name else value.T[:, :, None, None]
        found[name] = np.ascontiguousarray(value)
    return found
