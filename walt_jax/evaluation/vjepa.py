"""V-JEPA's ViT-H/16 (Bardes et al. 2024) and the attentive pooler of its Something-Something probe: JEDi's features."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from walt_jax.errors import UserError

SIDE = 224  # pixels
FRAMES = 16
HEADS = 16  # of ViT-H; not in the weights
FEATURES = 1280
LAYERS = 32
ENCODER_EPSILON, POOLER_EPSILON = 1e-6, 1e-5  # of layer normalisation
FILES = ("vith16.pth.tar", "ssv2-probe.pth.tar")  # of Meta's release, as JEDi names them
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

Linear = tuple[Float[Array, "i o"], Float[Array, " o"]]


class Network(NamedTuple):
    """
    Attributes:
        patch: kernel [t h w 3 d] and bias of the patches.
        positions: [n, d], added to the patches.
        layers: the blocks' weights, stacked.
        norm: after the blocks.
        query: [d], what the pooler asks with.
        pooler: the weights of its cross-attention and feed-forward layer.
    """

    patch: Linear
    positions: Float[Array, "n d"]
    layers: dict[str, Linear]
    norm: Linear
    query: Float[Array, " d"]
    pooler: dict[str, Linear]


BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
POOLER = ("norm1", "xattn.q", "xattn.kv", "xattn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Meta's two files of a folder; or the path, one file with the names of both."""
    return [path / name for name in FILES] if path.is_dir() else [path]


def weights_from(tensors: Mapping[str, np.ndarray], path: str, width: int = FEATURES, layers: int = LAYERS) -> Network:
    """The network, in float32.

    Args:
        tensors: `target_encoder.module.backbone.blocks.0.norm1.weight`, … of the encoder, and
            `classifier.module.pooler.query_tokens`, … of the probe; the prefixes may be missing.
        path: of the files, for messages.
        width, layers: of the encoder; tests have a small one.

    Raises:
        UserError: if one is missing or has another shape.
    """
    plain = {_short(name): value for name, value in tensors.items() if not name.startswith(("encoder.", "predictor."))}

    def tensor(name: str, *shape: int) -> np.ndarray:
        value = plain[name]
        if value.shape[: len(shape)] != shape:
            raise UserError(f"The V-JEPA weights {path} hold {name} of shape {list(value.shape)}, not {list(shape)} ….")
        return value.astype(np.float32)

    def linear(name: str) -> tuple[np.ndarray, np.ndarray]:
        return tensor(f"{name}.weight").T, tensor(f"{name}.bias")

    try:
        patch = np.transpose(tensor("patch_embed.proj.weight", width, 3), (2, 3, 4, 1, 0))
        blocks = [{part: linear(f"blocks.{number}.{part}") for part in BLOCK} for number in range(layers)]
        network = Network(
            patch=(patch, tensor("patch_embed.proj.bias", width)),
            positions=tensor("pos_embed", 1)[0],
            layers=jax.tree.map(lambda *each: np.stack(each), *blocks),
            norm=linear("norm"),
            query=tensor("pooler.query_tokens", 1, 1, width)[0, 0],
            pooler={part: linear(f"pooler.cross_attention_block.{part}") for part in POOLER},
        )
    except KeyError as error:
        raise UserError(
            f"The weights {path} lack {error}, so they are not V-JEPA's ViT-H/16 with its pooler; give a folder with "
            f"{' and '.join(FILES)}."
        ) from error
    return jax.tree.map(jnp.asarray, network)


def _short(name: str) -> str:
    """Without what checkpoints and parallel training put before it."""
    for prefix in ("target_encoder.", "classifier.", "module.", "backbone."):
        name = name.removeprefix(prefix)
    return name


def features(network: Network, clips: Float[Array, "b t h w 3"], heads: int = HEADS) -> Float[Array, "b d"]:
    """What the pooler makes of a clip's tokens.

    Args:
        network: see `weights_from`.
        clips: with ImageNet's mean and standard deviation taken off; as many patches as there are positions.
        heads: of attention.
    """
    kernel, bias = network.patch
    t, h, w = kernel.shape[:3]
    x = rearrange(clips, "b (n t) (i h) (j w) c -> b (n i j) (t h w c)", t=t, h=h, w=w)
    x = x @ kernel.reshape(-1, kernel.shape[-1]) + (bias[None] + network.positions)[None]

    def block(x: Array, layer: dict[str, Linear]) -> tuple[Array, None]:
        q, k, v = jnp.split(_linear(_norm(x, layer["norm1"], ENCODER_EPSILON), layer["attn.qkv"]), 3, axis=-1)
        x = x + _linear(_attention(q, k, v, heads), layer["attn.proj"])
        return x + _feed_forward(_norm(x, layer["norm2"], ENCODER_EPSILON), layer), None

    x = _norm(jax.lax.scan(block, x, network.layers)[0], network.norm, ENCODER_EPSILON)
    pooler = network.pooler
    query = jnp.broadcast_to(network.query[None, None], (len(x), 1, x.shape[-1]))
    k, v = jnp.split(_linear(_norm(x, pooler["norm1"], POOLER_EPSILON), pooler["xattn.kv"]), 2, axis=-1)
    # Meta's repository leaves the projection out of its forward pass; vjepa 0.1.2, which JEDi's pyproject pins, has it.
    query = query + _linear(_attention(_linear(query, pooler["xattn.q"]), k, v, heads), pooler["xattn.proj"])
    return (query + _feed_forward(_norm(query, pooler["norm2"], POOLER_EPSILON), pooler))[:, 0]


def _linear(x: Float[Array, "b n i"], weights: Linear) -> Float[Array, "b n o"]:
    return x @ weights[0] + weights[1][None, None]


def _feed_forward(x: Float[Array, "b n d"], layer: Mapping[str, Any]) -> Float[Array, "b n d"]:
    return _linear(jax.nn.gelu(_linear(x, layer["mlp.fc1"]), approximate=False), layer["mlp.fc2"])


def _norm(x: Float[Array, "b n d"], weights: Linear, epsilon: float) -> Float[Array, "b n d"]:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scale, bias = (weight[None, None] for weight in weights)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * scale + bias


def _attention(
    q: Float[Array, "b m d"], k: Float[Array, "b n d"], v: Float[Array, "b n d"], heads: int
) -> Float[Array, "b m d"]:
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    attention = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return rearrange(jnp.einsum("bhqk,bhkd->bhqd", attention, v), "b h n d -> b n (h d)")
