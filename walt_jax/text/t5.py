"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for the gated feed-forward layer).

Small encoders are trained from scratch with the denoiser; W.A.L.T uses the published T5-XL.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from walt_jax.config import Positive
from walt_jax.layers import Linear
from walt_jax.parallel.rules import constrain, gathered


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The encoder's sizes.

    Attributes:
        dim: width of the embeddings.
        layers: number of blocks.
        heads: attention heads.
        head_dim: width of a head.
        mlp_dim: width of the gated feed-forward layer.
        dtype: of the computation, "float32" or "bfloat16".
    """

    dim: Positive
    layers: Positive
    heads: Positive
    head_dim: Positive
    mlp_dim: Positive
    dtype: Literal["float32", "bfloat16"] = "float32"


RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE = 32, 128


def relative_buckets(length: int) -> Int[np.ndarray, "q k"]:
    """T5's bidirectional buckets of the distance k - q: one per short distance, logarithmic for long ones."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = RELATIVE_BUCKETS // 2
    exact = half // 2
    far = exact + (
        np.log(np.maximum(np.abs(distance), 1) / exact) / np.log(RELATIVE_MAX_DISTANCE / exact) * (half - exact)
    ).astype(int)
    magnitude = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return np.where(distance > 0, half, 0) + magnitude


class RMSNorm(nn.Module):
    """x / rms(x) · scale; T5's layer norm, without mean or bias."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return (x * scale[(None,) * (x.ndim - 1)]).astype(self.dtype)


class T5Encoder(nn.Module):
    """Token ids to contextual embeddings."""

    config: T5Config
    vocab_size: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        """`mask` is False on padding, which nothing attends to."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)

        def linear(features, axes, fan_in, name):
            # T5 does not divide logits by sqrt(head_dim); smaller initial weights make up for it.
            init = nn.initializers.normal(fan_in**-0.5)
            return Linear(features, axes, use_bias=False, kernel_init=init, dtype=dtype, name=name)

        inner = cfg.heads * cfg.head_dim
        table_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        table = self.param("embedding", table_init, (self.vocab_size, cfg.dim))
        x = gathered(table, ("vocab", "embed"), table.dtype)[ids].astype(dtype)
        x = constrain(x, "batch", None, "embed")
        bias_init = nn.with_logical_partitioning(nn.initializers.normal(cfg.dim**-0.5), ("relative", "heads"))
        bias_table = self.param("relative_bias", bias_init, (RELATIVE_BUCKETS, cfg.heads))
        bias = rearrange(bias_table[relative_buckets(ids.shape[1])], "q k h -> 1 h q k")
        bias = jnp.where(mask[:, None, None, :], bias, -1e9)
        for layer in range(cfg.layers):
            h = RMSNorm(dtype, name=f"attention_norm_{layer}")(x)
            q = linear(inner, ("embed", "heads"), cfg.dim * cfg.head_dim, f"query_{layer}")(h)
            k = linear(inner, ("embed", "heads"), cfg.dim, f"key_{layer}")(h)
            v = linear(inner, ("embed", "heads"), cfg.dim, f"value_{layer}")(h)
            q, k, v = (rearrange(a, "b n (h d) -> b n h d", h=cfg.heads) for a in (q, k, v))
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) + bias)
            h = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), v)
            h = rearrange(h, "b n h d -> b n (h d)")
            x = x + linear(cfg.dim, ("heads", "embed"), inner, f"attention_out_{layer}")(h)
            h = RMSNorm(dtype, name=f"mlp_norm_{layer}")(x)
            gate = nn.gelu(linear(cfg.mlp_dim, ("embed", "mlp"), cfg.dim, f"mlp_gate_{layer}")(h), approximate=True)
            h = gate * linear(cfg.mlp_dim, ("embed", "mlp"), cfg.dim, f"mlp_in_{layer}")(h)
            x = x + linear(cfg.dim, ("mlp", "embed"), cfg.mlp_dim, f"mlp_out_{layer}")(h)
            x = constrain(x, "batch", None, "embed")
        return RMSNorm(dtype, name="norm_out")(x)
