"""CLIP (Radford et al. 2021): embeddings of pictures and of captions in one space, with the weights of transformers."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from walt_jax.errors import UserError

EPSILON = 1e-5  # of layer normalisation
# Heads and activations are not in the weights; a config.json leaves out what is transformers' default.
DEFAULT_HEADS = {"vision": 12, "text": 8}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

Tensors = Mapping[str, np.ndarray]
Weights = dict[str, Any]


class Tower(NamedTuple):
    """One of the two transformers.

    Attributes:
        weights: as `weights_from` returns them.
        heads: of attention.
        activation: of the feed-forward layers, a key of `ACTIVATIONS`.
    """

    weights: Weights
    heads: int
    activation: str


class Clip(NamedTuple):
    """Both transformers, and their sizes.

    Attributes:
        vision, text: the towers.
        side: pixels of a picture.
        length: tokens of a caption.
        name: the picture tower's size, such as "ViT-B/32".
    """

    vision: Tower
    text: Tower
    side: int
    length: int
    name: str


def read_clip_config(folder: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        UserError: if it can't be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read ({error}); --weights=clip=FOLDER has a CLIP as transformers saves it: config.json, "
            "model.safetensors, vocab.json and merges.txt."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no object; restore it.")
    return config


def weights_from(tensors: Tensors, config: Mapping[str, Any], path: str) -> Clip:
    """The network, in float32.

    Args:
        tensors: transformers' names: `vision_model.encoder.layers.0.mlp.fc1.weight`, …, `text_projection.weight`.
        config: transformers' `config.json`, of which heads and activations are read.
        path: of the file, for messages.

    Raises:
        UserError: if a tensor is missing or the config has another activation.
    """
    try:
        towers = {}
        for kind in ("vision", "text"):
            settings = config.get(f"{kind}_config") or {}
            activation = settings.get("hidden_act", "quick_gelu")
            if activation not in ACTIVATIONS:
                raise UserError(f"The CLIP of {path} has the activation {activation!r}; give one with quick_gelu.")
            heads = settings.get("num_attention_heads", DEFAULT_HEADS[kind])
            towers[kind] = Tower(_tower(tensors, kind), heads, activation)
        patches = towers["vision"].weights["patch"]
        grid = math.isqrt(len(towers["vision"].weights["positions"]) - 1)
        width, size = patches.shape[3], patches.shape[0]
        letter = {768: "B", 1024: "L", 1280: "H", 1664: "bigG"}.get(width, f"{width} wide")
        name = f"ViT-{letter}/{size}"
        if grid * size != 224:
            name += f" of {grid * size} pixels"
        return Clip(towers["vision"], towers["text"], grid * size, len(towers["text"].weights["positions"]), name)
    except KeyError as error:
        raise UserError(
            f"The weights {path} lack {error}, so they are no CLIP's; give openai/clip-vit-base-patch32's, say, as "
            "transformers saves them."
        ) from error


def _tower(tensors: Tensors, kind: str) -> Weights:
    """The weights of one tower; those of its layers are stacked."""

    def tensor(name: str) -> Array:
        return jnp.asarray(tensors[name], jnp.float32)

    def norm(name: str) -> tuple[Array, Array]:
        return tensor(f"{model}.{name}.weight"), tensor(f"{model}.{name}.bias")

    model = f"{kind}_model"
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    layers, found = {}, []
    while f"{model}.encoder.layers.{len(found)}.layer_norm1.weight" in tensors:
        prefix = f"{model}.encoder.layers.{len(found)}"
        layer = {
            name.split(".")[1]: (tensor(f"{prefix}.{name}.weight").T, tensor(f"{prefix}.{name}.bias")) for name in names
        }
        layer |= {part: norm(f"encoder.layers.{len(found)}.{part}") for part in ("layer_norm1", "layer_norm2")}
        found.append(layer)
    if not found:
        raise KeyError(f"{model}.encoder.layers.0.layer_norm1.weight")
    layers = jax.tree.map(lambda *each: jnp.stack(each), *found)
    weights: Weights = {
        "layers": layers,
        "positions": tensor(f"{model}.embeddings.position_embedding.weight"),
        "projection": tensor(f"{'visual' if kind == 'vision' else 'text'}_projection.weight").T,
    }
    if kind == "text":
        return weights | {
            "tokens": tensor(f"{model}.embeddings.token_embedding.weight"),
            "norm_out": norm("final_layer_norm"),
        }
    return weights | {
        "class": tensor(f"{model}.embeddings.class_embedding"),
        "patch": jnp.transpose(tensor(f"{model}.embeddings.patch_embedding.weight"), (2, 3, 1, 0)),
        "norm_in": norm("pre_layrnorm"),  # so in transformers' files
        "norm_out": norm("post_layernorm"),
    }


def embed_pictures(tower: Tower, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """Embeddings of length 1.

    Args:
        tower: of pictures.
        pictures: `Clip.side` pixels square, with CLIP's mean and standard deviation taken off, see `clip_score`.
    """
    weights = tower.weights
    size = weights["patch"].shape[0]
    patches = rearrange(pictures, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
    x = patches @ weights["patch"].reshape(-1, weights["patch"].shape[-1])
    first = jnp.broadcast_to(weights["class"][None, None], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + weights["positions"][None]
    x = _blocks(tower, _norm(x, weights["norm_in"]), causal=False)
    return _unit(_norm(x[:, 0], weights["norm_out"]) @ weights["projection"])


def embed_texts(tower: Tower, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
    """Embeddings of length 1: the last token's, whose id is the greatest.

    Args:
        tower: of captions.
        ids: see `clip_tokens`; whatever is after the last token has no effect.
    """
    weights = tower.weights
    x = weights["tokens"][ids] + weights["positions"][None, : ids.shape[1]]
    x = _norm(_blocks(tower, x, causal=True), weights["norm_out"])
    last = jnp.take_along_axis(x, ids.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    return _unit(last @ weights["projection"])


def _blocks(tower: Tower, x: Float[Array, "b n d"], causal: bool) -> Float[Array, "b n d"]:
    """Pre-normalised attention and feed-forward layers, sequentially."""
    count = x.shape[1]
    seen = jnp.tril(jnp.ones((count, count), bool)) if causal else jnp.ones((count, count), bool)

    def linear(x: Array, weights: tuple[Array, Array]) -> Array:
        return x @ weights[0] + weights[1][None, None]

    def block(x: Array, layer: Weights) -> tuple[Array, None]:
        h = _norm(x, layer["layer_norm1"])
        q, k, v = (
            rearrange(linear(h, layer[name]), "b n (h d) -> b h n d", h=tower.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        attention = jax.nn.softmax(jnp.where(seen[None, None], logits, -jnp.inf))
        h = rearrange(jnp.einsum("bhqk,bhkd->bhqd", attention, v), "b h n d -> b n (h d)")
        x = x + linear(h, layer["out_proj"])
        h = ACTIVATIONS[tower.activation](linear(_norm(x, layer["layer_norm2"]), layer["fc1"]))
        return x + linear(h, layer["fc2"]), None

    return jax.lax.scan(block, x, tower.weights["layers"])[0]


def _norm(x: Float[Array, "*b d"], weights: tuple[Array, Array]) -> Float[Array, "*b d"]:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scale, bias = (weight[(None,) * (x.ndim - 1)] for weight in weights)
    return (x - mean) * jax.lax.rsqrt(variance + EPSILON) * scale + bias


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
