"""Class labels instead of captions: a fixed list of names."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from walt_jax.errors import UserError


class Labels:
    """Encodes a class name as its index. Without names all captions are 0, for an unconditional model.

    Args:
        names: of the classes, in the order of their indices.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(self.names)}

    @classmethod
    def load(cls, path: pathlib.Path) -> "Labels":
        """Reads a list that `dump` has written.

        Raises:
            UserError: if the file can't be read.
        """
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("it is not a list of names")
            return cls(names)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read ({error}); restore it, or start in another --workdir.") from error

    def dump(self) -> bytes:
        """The list as JSON."""
        return (json.dumps(self.names, ensure_ascii=False, indent=1) + "\n").encode()

    def encode(self, captions: Sequence[str]) -> Int[np.ndarray, "b 1"]:
        """The index of each name; of the empty name, for guidance, it is the number of names.

        Raises:
            UserError: if a name is not in the list.
        """
        if not self.names:
            return np.zeros((len(captions), 1), np.int32)
        for caption in captions:
            if caption and caption not in self._index:
                some = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
                raise UserError(f"{caption!r} is not one of the {len(self.names)} classes of this run ({some}).")
        numbers = [self._index[caption] if caption else len(self.names) for caption in captions]
        return np.array(numbers, np.int32)[:, None]
