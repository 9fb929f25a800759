"""Captions to token ids and back, with sentencepiece."""

import functools
import io
import pathlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int

from walt_jax.errors import UserError

PAD, EOS = 0, 1  # T5's ids; every caption ends with EOS, so the empty one, used for guidance, is only EOS


def train(captions: Sequence[str], size: int) -> bytes:
    """Trains a vocabulary of at most `size` pieces on captions. The same captions give the same bytes.

    Upper and lower case are equal. Characters that the captions lack become bytes, so that any prompt can be encoded.

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
        character_coverage=0.9995,  # the rarest characters of large alphabets become bytes
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
    """Encodes captions with a sentencepiece model that has T5's ids: 0 is padding, 1 the end of a caption.

    Some copies of T5's vocabulary have a begin piece, `<s>`, which T5's embedding table lacks. It has no id here, and
    the ids after it are lower by one.

    Args:
        model: a serialized sentencepiece model, as `train` returns it or a `.model` file holds it.
        length: tokens of an encoded caption, EOS included; longer captions are cut.
    """

    def __init__(self, model: bytes, length: int):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.length = length

    @classmethod
    def load(cls, path: pathlib.Path, length: int) -> "Vocabulary":
        """Reads a `.model` file.

        Raises:
            UserError: if it can't be read.
        """
        try:
            return cls(path.read_bytes(), length)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} can't be read as a sentencepiece model; restore it.") from error

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size() - (self._processor.bos_id() >= 0)

    def count(self, caption: str) -> int:
        """Number of tokens of a caption before it is cut, without `EOS`."""
        return len(self._processor.encode(caption))

    def encode(self, captions: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """int32 ids, padded with `PAD` to `length`."""
        ids, begin = np.full((len(captions), self.length), PAD, np.int32), self._processor.bos_id()
        for row, caption in zip(ids, captions, strict=True):
            pieces = self._processor.encode(caption)  # a list of captions would start threads, which take longer
            pieces = [*(piece - (0 <= begin < piece) for piece in pieces[: self.length - 1]), EOS]
            row[: len(pieces)] = pieces
        return ids
