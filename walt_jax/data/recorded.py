"""Records the clips of an order, so that a resumed run keeps its order when files were added or removed."""

import dataclasses
import hashlib
import json
from typing import Self

from etils import epath

from walt_jax.data.clips import StoredClips
from walt_jax.data.pipeline import Mixture
from walt_jax.data.shards import read_object
from walt_jax.errors import UserError

NAMED = 3  # clips that are named in a warning


@dataclasses.dataclass(frozen=True)
class RecordedClips:
    """The clips of a mixture, in the order of their indices.

    Attributes:
        names: for each source, its path and its clips' names (`StoredClips.names`); None for drawn clips.
        weights: the mixture's.
    """

    names: tuple[tuple[str, tuple[str, ...]] | None, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, mixture: Mixture) -> Self:
        sources = (source if isinstance(source, StoredClips) else None for source in mixture.sources)
        return cls(
            tuple(source and (str(source.store.path), tuple(source.names)) for source in sources), mixture.weights
        )

    @classmethod
    def load(cls, path: epath.PathLike, remedy: str) -> Self:
        """Reads a file with the content of `to_json`.

        Raises:
            UserError: if the file is missing or damaged.
        """
        found = read_object(epath.Path(path), remedy)
        try:
            names = tuple(source and (str(source[0]), tuple(map(str, source[1]))) for source in found["names"])
            return cls(names, tuple(map(float, found["weights"])))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is damaged: {remedy}.") from error

    def to_json(self) -> str:
        return json.dumps({"weights": self.weights, "names": self.names}, indent=0, ensure_ascii=False) + "\n"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def apply(self, mixture: Mixture) -> tuple[Mixture, list[str]]:
        """Restores the recorded order.

        Args:
            mixture: the current clips of the same sources.

        Returns:
            The mixture with the recorded clips at their recorded indices, and a sentence for each source that differs.
            Removed clips are unusable, added ones are left out.

        Raises:
            UserError: if none of a source's recorded clips exists any more.
        """
        sources, sentences = [], []
        for source, recorded in zip(mixture.sources, self.names, strict=True):
            if recorded is not None:
                path, names = recorded
                if names != tuple(source.names):
                    sentences.append(_changes(path, names, source.names))
                    source = source.reindexed(names)
            sources.append(source)
        return Mixture(tuple(sources), self.weights), sentences


def _changes(path: str, before: tuple[str, ...], now: list[str]) -> str:
    """A sentence on added and removed clips.

    Raises:
        UserError: if all were removed.
    """
    old, new = set(before), set(now)
    removed, added = [name for name in before if name not in new], [name for name in now if name not in old]
    if len(removed) == len(before):
        raise UserError(
            f"{path} has none of the {len(before):,} clips any more that this order was made of, the first being "
            f"{before[0]}: restore them, or choose another folder for what is to be made."
        )
    kinds = {"added": added, "removed": removed}
    parts = [f"{len(names):,} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return f"clips of {path} have changed: {' and '.join(parts) or 'their order differs'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
