"""LPIPS (Zhang et al. 2018): a distance between features of VGG-16, from weights that the user has.

Nothing is downloaded. Where PyTorch and the package `lpips` are installed, the weights are written once with

    import lpips, safetensors.torch
    state = {k: v.clone() for k, v in lpips.LPIPS(net="vgg").state_dict().items()}
    safetensors.torch.save_file(state, "lpips_vgg.safetensors")
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from walt_jax.errors import UserError

# VGG-16 up to relu5_3: by slice, the numbers of its convolutions; a slice ends in features that are compared.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# LPIPS' normalisation of pixels in -1..1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

FeatureWeights = dict[str, Float[Array, "..."]]


def load_features(path: str | pathlib.Path) -> FeatureWeights:
    """Reads the weights, convolutions as [kh, kw, in, out].

    Raises:
        UserError: if the file can't be read or lacks one.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The perceptual weights {path} can't be read ({error}); walt_jax/tokenizer/perceptual.py says how to "
            "write them."
        ) from error
    weights: FeatureWeights = {}
    try:
        for part, layers in enumerate(SLICES):
            for layer in layers:
                kernel = tensors[f"net.slice{part + 1}.{layer}.weight"]
                weights[f"kernel{layer}"] = jnp.asarray(np.transpose(kernel, (2, 3, 1, 0)), jnp.float32)
                weights[f"bias{layer}"] = jnp.asarray(tensors[f"net.slice{part + 1}.{layer}.bias"], jnp.float32)
            weights[f"lin{part}"] = jnp.asarray(tensors[f"lin{part}.model.1.weight"].reshape(-1), jnp.float32)
    except KeyError as error:
        raise UserError(
            f"The perceptual weights {path} lack {error}; walt_jax/tokenizer/perceptual.py says how to write them."
        ) from error
    return weights


def _features(weights: FeatureWeights, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n h w c"]]:
    x = (images - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None]
    features = []
    for part, layers in enumerate(SLICES):
        if part:
            n, h, w, c = x.shape
            x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
        for layer in layers:
            x = jax.lax.conv_general_dilated(
                x, weights[f"kernel{layer}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + weights[f"bias{layer}"][None, None, None])
        features.append(x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20) + 1e-10))
    return features


def feature_distance(
    weights: FeatureWeights, one: Float[Array, "b t h w 3"], other: Float[Array, "b t h w 3"]
) -> Float[Array, " b"]:
    """LPIPS of clips in -1..1, the mean over their frames. Height and width are at least 16."""
    batch, frames = one.shape[:2]
    pairs = (_features(weights, clip.reshape(-1, *clip.shape[2:])) for clip in (one, other))
    distance = jnp.zeros(batch * frames)
    for part, (mine, theirs) in enumerate(zip(*pairs, strict=True)):
        distance = distance + (jnp.square(mine - theirs) * weights[f"lin{part}"][None, None, None]).sum(-1).mean(
            axis=(1, 2)
        )
    return distance.reshape(batch, frames).mean(1)
