"""Writes autoencoder_kl.safetensors beside this file: a small AutoencoderKL of diffusers and what it computes.

Needs torch, diffusers and safetensors (made with diffusers 0.42.1); the tests need none but the last:

    python tests/golden/make_autoencoder_kl.py

The file holds
    weights.NAME     float16, as diffusers names them
    images           [2, 24, 40, 3], pixels in -1..1
    mean, logvar     [2, 6, 10, 4], of the images, before scaling_factor
    latents, pixels  [2, 3, 5, 4] scaled, and [2, 12, 20, 3] decoded from them
and as metadata, in JSON: `config`, diffusers' config.json; `old` and `latent_diffusion`, for each of diffusers' names
the tensor's name in older files and in latent-diffusion's. That the names are these is diffusers' word: it reads files
with them here.
"""

import json
import pathlib
import re
import tempfile

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 12, 16),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
}
LAST = len(CONFIG["block_out_channels"]) - 1


def random_model() -> AutoencoderKL:
    """Every parameter at random, or a norm's scale or a bias left out would not be seen."""
    model, generator = AutoencoderKL(**CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                # Attention with logits near 0 would be a mean over positions.
                gain = 2.0 if "to_q" in name or "to_k" in name else 1.0
                value.copy_(gain * noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
        # The first norm of each side sees a variance so small that its epsilon counts.
        for value in (*model.encoder.conv_in.parameters(), *model.decoder.conv_in.parameters()):
            value.mul_(0.03)
        # Two of the log variances reach their bounds, in some places.
        model.quant_conv.bias[-2:] = torch.tensor([20.0, -30.0])
    # Both sides compute from what the file holds.
    return model.half().double().eval()


def old_name(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name


def latent_diffusion_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{LAST - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{LAST - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f".attn_1.{theirs}.", f".attn_1.{ours}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def check_names(model: AutoencoderKL, old: dict[str, str], latent_diffusion: dict[str, str]) -> None:
    """That diffusers reads the same model from files with these names."""
    state = model.state_dict()
    theirs = {}
    for name, value in state.items():
        pointwise = value.ndim == 2
        theirs[latent_diffusion[name]] = value[:, :, None, None] if pointwise else value
    converted = convert_ldm_vae_checkpoint(theirs, CONFIG)
    assert converted.keys() == state.keys()
    with tempfile.TemporaryDirectory() as folder:
        model.save_config(folder)
        tensors = {old[name]: value.contiguous() for name, value in state.items()}
        save_torch(tensors, f"{folder}/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        loaded = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float64).state_dict()
    for name, value in state.items():
        assert torch.equal(value, converted[name].reshape(value.shape)), name
        assert torch.equal(value, loaded[name]), name


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.permute(0, 2, 3, 1).numpy().astype(np.float32))


def main() -> None:
    model, generator = random_model(), torch.Generator().manual_seed(1)
    state = model.state_dict()
    old = {name: old_name(name) for name in state}
    latent_diffusion = {name: latent_diffusion_name(name) for name in state}
    check_names(model, old, latent_diffusion)
    # Rounded to what the file holds before they are used.
    images = (2 * torch.rand(2, 3, 24, 40, generator=generator) - 1).double()
    latents = torch.randn(2, 4, 3, 5, generator=generator).double()
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        pixels = model.decode(latents / CONFIG["scaling_factor"]).sample
    arrays = {
        "images": images,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "latents": latents,
        "pixels": pixels,
    }
    tensors = {name: channels_last(value) for name, value in arrays.items()}
    tensors |= {f"weights.{name}": value.half().numpy() for name, value in state.items()}
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    metadata = {"config": {"_class_name": "AutoencoderKL", **config}, "old": old, "latent_diffusion": latent_diffusion}
    path = pathlib.Path(__file__).with_name("autoencoder_kl.safetensors")
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in metadata.items()})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone
    print(f"{path}: {path.stat().st_size} bytes, {sum(p.numel() for p in model.parameters())} parameters")
    for name in ("mean", "logvar", "pixels"):
        print(name, tensors[name].shape, tensors[name].std(axis=(0, 1, 2)), tensors[name].min(), tensors[name].max())


if __name__ == "__main__":
    main()
