"""Captions read by an encoder that is not trained."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import PAD, Vocabulary

READ_AT_ONCE = 8  # one shape: what is read does not depend on what is read beside it


class Embedded(NamedTuple):
    """Captions as an encoder has read them.

    Attributes:
        embeddings: of m tokens a caption, zeros where there is none.
        mask: which there are.
    """

    embeddings: Float[Array, "*b m e"]
    mask: Bool[Array, "*b m"]


class FrozenText:
    """An encoder with its parameters and its vocabulary.

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
        """Embeds ids."""
        parts = []
        for first in range(0, len(ids), READ_AT_ONCE):
            rows = np.minimum(np.arange(first, first + READ_AT_ONCE), len(ids) - 1)
            parts.append(jax.device_get(self._read(self._params, ids[rows])))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(ids)], *parts)

    def encode(self, captions: Sequence[str]) -> Embedded:
        """Embeds captions."""
        return self.read(self._vocabulary.encode(captions))

    def each(self, captions: Sequence[str]) -> list[Float[np.ndarray, "n e"]]:
        """Embeds captions; of each the tokens that it has."""
        return [embeddings[mask] for embeddings, mask in zip(*self.encode(captions), strict=True)]


def filled_up(embeddings: Float[np.ndarray, "n e"], length: int) -> Embedded:
    """One of `each`'s as a row of `encode`'s."""
    count = len(embeddings)
    return Embedded(np.pad(embeddings, ((0, length - count), (0, 0))), np.arange(length) < count)
