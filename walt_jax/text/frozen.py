"""Embeds captions with an encoder that is not trained."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD, Vocabulary

CAPTIONS_AT_ONCE = 8  # of lists of any length: one shape, so that a caption's embeddings don't depend on the others'


class Embedded(NamedTuple):
    """Embedded captions.

    Attributes:
        embeddings: of the m tokens of a caption, zeros at padding.
        mask: False at padding.
    """

    embeddings: Float[Array, "*b m e"]
    mask: Bool[Array, "*b m"]


class FrozenText:
    """A frozen text encoder.

    Args:
        encoder: the module.
        params: its parameters.
        vocabulary: captions to ids.
    """

    def __init__(self, encoder: T5Encoder, params: Any, vocabulary: Vocabulary):
        self._vocabulary, self._params = vocabulary, jax.device_put(params)

        @jax.jit
        def read(params, ids):
            mask = ids != PAD
            return Embedded(encoder.apply({"params": params}, ids, mask) * mask[..., None], mask)

        self._read = read

    def read(self, ids: Int[np.ndarray, "b m"]) -> Embedded:
        """Embeds the ids of a batch at once; a program is compiled for each batch size."""
        return jax.device_get(self._read(self._params, ids))

    def encode(self, captions: Sequence[str]) -> Embedded:
        """Embeds captions, any number of them."""
        ids, parts = self._vocabulary.encode(captions), []
        for first in range(0, len(ids), CAPTIONS_AT_ONCE):
            rows = np.minimum(np.arange(first, first + CAPTIONS_AT_ONCE), len(ids) - 1)
            parts.append(self.read(ids[rows]))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(ids)], *parts)

    def each(self, captions: Sequence[str]) -> list[Float[np.ndarray, "n e"]]:
        """Embeds captions; the embeddings of each without padding."""
        return [embeddings[mask] for embeddings, mask in zip(*self.encode(captions), strict=True)]


def padded(embeddings: Sequence[Float[np.ndarray, "n e"]], length: int) -> Embedded:
    """What `each` returns, as `encode` returns it; at least one caption."""
    counts = np.array([len(one) for one in embeddings])
    whole = np.zeros((len(embeddings), length, embeddings[0].shape[1]), embeddings[0].dtype)
    for row, one in zip(whole, embeddings, strict=True):
        row[: len(one)] = one
    return Embedded(whole, np.arange(length) < counts[:, None])
