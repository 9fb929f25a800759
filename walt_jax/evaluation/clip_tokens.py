"""CLIP's byte-pair encoding of captions, with the user's `vocab.json` and `merges.txt`."""

import itertools
import json
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from walt_jax.errors import UserError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
END_OF_WORD = "</w>"


def byte_characters() -> list[str]:
    """A printable character for each byte, GPT-2's: printable Latin-1 stands for itself, the others follow from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class ClipTokens:
    """Encodes captions.

    Args:
        ids: of each piece.
        merges: pairs of pieces, the first first.
        length: ids of a caption, those of begin and end included; what is longer is cut.
    """

    def __init__(self, ids: dict[str, int], merges: Sequence[tuple[str, str]], length: int):
        self._ids, self.length = ids, length
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._characters = byte_characters()
        self._known: dict[str, list[int]] = {}

    @classmethod
    def load(cls, folder: pathlib.Path, length: int) -> "ClipTokens":
        """Reads `vocab.json` and `merges.txt` of a folder.

        Raises:
            UserError: if one can't be read.
        """
        path = folder / "vocab.json"
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
            path = folder / "merges.txt"
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} can't be read ({error}); --weights=clip=FOLDER needs CLIP's vocab.json and merges.txt."
            ) from error
        if not isinstance(ids, dict) or not {BEGIN, END} <= set(ids):
            raise UserError(f"{folder / 'vocab.json'} lacks {BEGIN} or {END}, so it is not CLIP's; restore it.")
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{path} has a line that is not two pieces; restore it.")
        return cls(ids, pairs, length)

    def encode(self, captions: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """int32 ids, padded with that of `END`."""
        rows = np.full((len(captions), self.length), self._ids[END], np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = [self._ids[BEGIN], *self._pieces(caption)][: self.length - 1]
            row[: len(ids)] = ids
        return rows

    def _pieces(self, caption: str) -> Iterator[int]:
        for word in words(caption):
            if word not in self._known:
                characters = [self._characters[byte] for byte in word.encode("utf-8", "surrogateescape")]
                unknown = self._ids[END]
                self._known[word] = [self._ids.get(piece, unknown) for piece in self._merged(characters)]
            yield from self._known[word]

    def _merged(self, pieces: list[str]) -> list[str]:
        """Merges the pair that comes first in the list, everywhere, until none is in it."""
        pieces = [*pieces[:-1], pieces[-1] + END_OF_WORD]
        while len(pieces) > 1:
            pair = min(itertools.pairwise(pieces), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if pair not in self._ranks:
                break
            merged: list[str] = []
            place = 0
            while place < len(pieces):
                both = tuple(pieces[place : place + 2]) == pair
                merged.append("".join(pair) if both else pieces[place])
                place += 2 if both else 1
            pieces = merged
        return pieces


def words(caption: str) -> list[str]:
    """A caption's words: contractions, runs of letters, single digits, runs of anything else but space.

    Unicode is composed and in lower case, as in transformers' fast tokenizer.
    """
    text, found, place = unicodedata.normalize("NFC", caption).lower(), [], 0
    while place < len(text):
        kind = _kind(text[place])
        end = place + 1
        contraction = next((part for part in CONTRACTIONS if text.startswith(part, place)), None)
        if contraction:
            end = place + len(contraction)
        elif kind in ("letter", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            found.append(text[place:end])
        place = end
    return found


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")
