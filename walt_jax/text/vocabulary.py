"""Captions to token ids and back, with sentencepiece."""

import functools
import io
import pathlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int

from walt_jax.errors import UserError

PAD, EOS = 0, 1  # T5's ids; every caption ends with EOS, so the empty one, used for guidance, is EOS alone


def train(captions: Sequence[str], size: int) -> bytes:
    """Trains a vocabulary of at most `size` pieces on captions. The same captions give the same bytes.

    Case is folded; characters that the captions lack are spelled in bytes, so that every prompt can be read.

    Returns:
        A serialized sentencepiece model.

    Raises:
        UserError: if `size` is too small for the captions' characters and 256 bytes.
    """
    model = io.BytesIO()
    fit = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=iter(sorted({c for c in captions if c.strip()}) or ["a clip"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.9995,  # the rarest characters of large alphabets are spelled in bytes
        max_sentence_length=2**20,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=PAD,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    try:
        fit()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(f"config.text.vocab_size={size} does not suit the captions ({reason}); raise it.") from error
    return model.getvalue()


class Vocabulary:
    """Encodes captions with a sentencepiece model whose ids are T5's: 0 pads, 1 ends.

    Some copies of T5's own vocabulary have a piece that begins, `<s>`, of which its table of embeddings knows nothing:
    it has no id here, and those after it are one less.

    Args:
        model: a serialized sentencepiece model, as `train` returns it or a `.model` file holds it.
        length: tokens of an encoded caption, EOS included; what is longer is cut.
    """

    def __init__(self, model: bytes, length: int):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.length = length

    @classmethod
    def load(cls, path: pathlib.Path, length: int) -> "Vocabulary":
        """Reads a `.model` file.

        Raises:
            UserError: if it isn't one.
        """
        try:
            return cls(path.read_bytes(), length)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is no sentencepiece model that can be read; restore it.") from error

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size() - (self._processor.bos_id() >= 0)

    def count(self, caption: str) -> int:
        """Tokens of a caption, however many; without `EOS`."""
        return len(self._processor.encode(caption))

    def encode(self, captions: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """int32 ids, padded with `PAD` to `length`; a position is text where the id is not `PAD`."""
        ids, begin = np.full((len(captions), self.length), PAD, np.int32), self._processor.bos_id()
        for row, pieces in zip(ids, self._processor.encode(list(captions)), strict=True):
            pieces = [*(piece - (0 <= begin < piece) for piece in pieces[: self.length - 1]), EOS]
            row[: len(pieces)] = pieces
        return ids
