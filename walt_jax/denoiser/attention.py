"""Multi-head attention within windows, with q-k normalisation and Swin's relative position bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from walt_jax.denoiser.windows import Window, merge, partition
from walt_jax.layers import Linear


def relative_index(sizes: tuple[int, int, int]) -> Int[np.ndarray, "l l"]:
    """For each pair of a window's tokens, the index of their offset (t, y, x) among all offsets (Liu et al. 2021)."""
    places = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, 3)
    offset = places[:, None] - places[None, :] + np.array(sizes) - 1
    return np.ravel_multi_index(tuple(np.moveaxis(offset, -1, 0)), [2 * size - 1 for size in sizes])


class WindowAttention(nn.Module):
    """Each token attends to its window's tokens and, where there is text, to all of its clip's text tokens.

    With text this is W.A.L.T's cross-attention, k = v = concat[q, text]; without, its self-attention.

    Attributes:
        heads: attention heads.
        window: which tokens see each other.
        dtype: of the computation.
    """

    heads: int
    window: Window
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        text: Float[Array, "b n d"] | None = None,
        text_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        batch, *grid, dim = x.shape
        sizes = self.window.sizes(tuple(grid))

        def project(name):
            return Linear(dim, ("embed", "heads"), use_bias=False, dtype=self.dtype, name=name)

        # Norms over a head's features, learned scale (ViT-22B): logits stay bounded whatever the weights do.
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        query_norm = nn.LayerNorm(use_bias=False, scale_init=scale_init, dtype=self.dtype, name="query_norm")
        key_norm = nn.LayerNorm(use_bias=False, scale_init=scale_init, dtype=self.dtype, name="key_norm")
        to_key, to_value = project("key"), project("value")

        def heads(y):
            return rearrange(y, "b n (heads d) -> b n heads d", heads=self.heads)

        tokens = partition(x, sizes)
        length, windows_per_clip = tokens.shape[1], tokens.shape[0] // batch
        query = query_norm(heads(project("query")(tokens)))
        key, value = key_norm(heads(to_key(tokens))), heads(to_value(tokens))

        table_init = nn.with_logical_partitioning(nn.initializers.zeros, ("relative", "heads"))
        table = self.param("relative_bias", table_init, (int(np.prod([2 * s - 1 for s in sizes])), self.heads))
        bias = rearrange(table[relative_index(sizes)], "q k heads -> 1 heads q k")
        mask = None
        if text is not None:
            key, value = (
                jnp.concatenate([own, repeat(other, "b ... -> (b r) ...", r=windows_per_clip)], axis=1)
                for own, other in ((key, key_norm(heads(to_key(text)))), (value, heads(to_value(text))))
            )
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, text.shape[1])))
            mask = jnp.pad(text_mask, ((0, 0), (length, 0)), constant_values=True)
            mask = repeat(mask, "b k -> (b r) 1 1 k", r=windows_per_clip)
        y = jax.nn.dot_product_attention(query, key, value, bias=bias.astype(self.dtype), mask=mask)
        y = merge(rearrange(y, "b n heads d -> b n (heads d)"), sizes, tuple(grid))
        return Linear(dim, ("heads", "embed"), use_bias=False, dtype=self.dtype, name="out")(y)
