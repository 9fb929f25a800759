"""The data pipeline: clips of several sources in one order."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import numpy as np

from walt_jax.config import Fraction, Positive, Range
from walt_jax.data.clips import StoredClips
from walt_jax.data.drawn import DrawnClips
from walt_jax.data.folder import Folder, is_data_set
from walt_jax.data.limits import DecodeLimits
from walt_jax.data.order import Order
from walt_jax.data.shapes import ClipShape
from walt_jax.data.store import Store
from walt_jax.data.stream import Kind
from walt_jax.errors import UserError
from walt_jax.remote import check_reachable


class Source(Protocol):
    """Captioned clips by index. Their randomness comes from the passed generator only."""

    captions: list[str]

    def __len__(self) -> int: ...

    def kind(self, index: int, rng: np.random.Generator) -> Kind | None:
        """(index of the shape, t, h, w) of what `sample` gives; None for a clip that is known to be unusable.

        It depends on files, not on what has been read before, so that all processes know the same. With an `rng` in the
        state that `sample` gets, a clip that proves shorter than its header says may be of another kind.
        """

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """{"video": uint8 [t, h, w, 3], "caption": str, "shape": its index}, or None for an unusable clip."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources as one.

    Attributes:
        sources: one or more.
        weights: of the sources, not normalised.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def captions(self) -> list[str]:
        return [caption for source in self.sources for caption in source.captions]

    def kind(self, index: int, rng: np.random.Generator) -> Kind | None:
        """See `Source`; by its index over all sources."""
        source, index = self._find(index)
        return source.kind(index, rng)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """A clip by its index over all sources."""
        source, index = self._find(index)
        return source.sample(index, rng)

    def _find(self, index: int) -> tuple[Source, int]:
        for source in self.sources:
            if index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(index)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from and what they are made into.

    Attributes:
        source: "drawn" for the built-in shapes; a folder of videos and images, with an optional `metadata.csv`; an
            ArrayRecord data set written by `--mode=prepare` or TFDS; or several with weights, as in
            "FOLDER, FOLDER*2, drawn". A source without a weight has 1; without any weights, all clips are equally
            likely.
        frames: frames per clip.
        height, width: in pixels.
        fps: frames per second.
        captions: columns of the folder's table that hold captions, with the weights by which one is drawn for each
            sample, as in "long*0.95, short*0.05"; empty captions are not drawn. One column may hold each clip's class.
        flips: probability that a clip is mirrored, left to right.
        caption_dropout: probability that a clip is trained without its caption, for classifier-free guidance.
        cache_bytes: memory for decoded clips of a source.
        max_bad_fraction: maximum share of a source's files that may be unreadable or vanish; more stop the run.
        limits: see `DecodeLimits`.
    """

    source: str
    frames: Positive
    height: Positive
    width: Positive
    fps: Annotated[float, Range(0.001, 1000)] = 8.0
    captions: str = "caption"
    flips: Fraction = 0.0
    caption_dropout: Fraction = 0.1
    cache_bytes: int = 2**30
    max_bad_fraction: Fraction = 0.0
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)

    def __post_init__(self):
        if "drawn" in dict(self.parts) and self.height != self.width:
            raise ValueError(f"drawn clips are square; height={self.height} and width={self.width} differ")
        if not self.columns:
            raise ValueError("captions names no column")

    @property
    def parts(self) -> list[tuple[str, float | None]]:
        """Each source, and its weight if it has one."""
        return weighted("source", self.source)

    @property
    def columns(self) -> dict[str, float]:
        """The caption columns and their weights."""
        return {name: 1.0 if weight is None else weight for name, weight in weighted("captions", self.captions)}


def weighted(knob: str, words: str) -> list[tuple[str, float | None]]:
    """The names in a list such as "one, other*2", each with its weight or None.

    Raises:
        ValueError: if a weight isn't above 0.
    """
    found: list[tuple[str, float | None]] = []
    for word in filter(None, map(str.strip, words.split(","))):
        name, star, weight = word.rpartition("*")
        if not star:
            found.append((word, None))
            continue
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise ValueError(f"{knob}: {word!r} should have a weight above 0 after the *, as in {name.strip()}*2")
        found.append((name.strip(), number))
    return found


class Data:
    """A config's clips; each source is listed and checked once.

    Args:
        config: see `DataConfig`.
        refuse: whether problems raise errors; if not, `problems` lists them, and `source` leaves out sources without
            readable clips.
    """

    def __init__(self, config: DataConfig, refuse: bool = True):
        self.config, self._refuse = config, refuse
        self._unusable: list[str] = []
        self._folder = functools.cache(self._open)
        self.source = functools.cache(self._source)

    @property
    def stores(self) -> dict[str, Store]:
        """The sources that are read from files, by path."""
        return {path: self._folder(path) for path, _ in self.config.parts if path != "drawn"}

    @property
    def problems(self) -> list[str]:
        """The problems for which training would stop, a sentence each."""
        found = [problem for store in self.stores.values() for problem in store.problems]
        return list(dict.fromkeys(found + self._unusable))

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The files skipped so far: a list of {`file`: with its folder's path, `reason`}."""
        return [
            {"file": str(folder.path / entry["file"]), "reason": entry["reason"]}
            for folder in self.stores.values()
            for entry in folder.skipped
        ]

    def _open(self, path: str) -> Store:
        config = self.config
        check_reachable(path)
        kind = Folder
        if is_data_set(path):
            from walt_jax.data.records import Records  # its imports take seconds

            kind = Records
        return kind(path, config.columns, config.cache_bytes, config.max_bad_fraction, config.limits, self._refuse)

    def _source(self, split: str, shapes: tuple[ClipShape, ...]) -> Mixture:
        """The clips of a split in some shapes.

        Args:
            split: "train", "held_out" or, for drawn clips, "all".
            shapes: see `StoredClips`.

        Raises:
            UserError: if a folder, its captions or too many of its files can't be read.
        """
        parts = self.config.parts
        if not parts:
            raise UserError("config.data.source is not set; give a folder of videos: --config.data.source=FOLDER.")
        sources: list[Source] = []
        kept: list[tuple[str, float | None]] = []
        for path, weight in parts:
            if path == "drawn":
                for shape in shapes:
                    if shape.side is None and shape.height != shape.width:
                        raise UserError(
                            f"Drawn clips are square; height={shape.height} and width={shape.width} differ in a "
                            "stage's shapes."
                        )
                sources.append(DrawnClips(split, shapes))
            else:
                try:
                    sources.append(StoredClips(self._folder(path), split, shapes, self.config.fps))
                except UserError as error:
                    if self._refuse:
                        raise
                    self._unusable.append(str(error))
                    continue
            kept.append((path, weight))
        has_weights = any(weight is not None for _, weight in kept)
        weights = [weight or 1.0 for _, weight in kept] if has_weights else [float(len(source)) for source in sources]
        return Mixture(tuple(sources), tuple(weights))


Clip = dict[str, Any]


class Clips:
    """Clips by their number in the order.

    Args:
        mixture: the sources.
        seed: of the order, the clips' generators and the caption dropout.
        encode: captions to ids, see `text.Vocabulary.encode`; None leaves captions out.
        caption_dropout: probability of an empty caption.
        flips: probability that a clip is mirrored, left to right.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        encode: Callable[[list[str]], np.ndarray] | None = None,
        caption_dropout: float = 0.0,
        flips: float = 0.0,
    ):
        self._mixture, self._seed, self._encode, self._dropout = mixture, seed, encode, caption_dropout
        self._flips = flips
        self._order = Order([len(source) for source in mixture.sources], mixture.weights, seed)

    def kind(self, number: int) -> Kind | None:
        """See `stream.Numbered`: (index of the shape, t, h, w)."""
        draw = self._order[number]
        return self._mixture.sources[draw.source].kind(draw.index, np.random.default_rng([self._seed, number]))

    def __getitem__(self, number: int) -> Clip | None:
        """{"number", "shape", "video": uint8 [t, h, w, 3]}, and "text": int32 [n] if captions are encoded."""
        draw = self._order[number]
        rng = np.random.default_rng([self._seed, number])
        clip = self._mixture.sources[draw.source].sample(draw.index, rng)
        if clip is None:
            return None
        video = clip["video"]
        if self._flips and rng.random() < self._flips:
            video = np.ascontiguousarray(video[:, :, ::-1])
        sample = {"number": number, "shape": clip["shape"], "video": video}
        if self._encode is None:
            return sample
        caption = "" if rng.random() < self._dropout else clip["caption"]
        return {**sample, "text": self._encode([caption])[0]}
