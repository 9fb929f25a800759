"""Real clips that samples are compared with, by number; and the statistics of their features, kept in a file."""

import dataclasses
import functools
import io
import pathlib
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from jaxtyping import Float, Int

from walt_jax.data.clips import StoredClips
from walt_jax.data.pipeline import Mixture
from walt_jax.data.recorded import RecordedClips
from walt_jax.errors import UserError
from walt_jax.evaluation.distances import Reference
from walt_jax.evaluation.feature_protocol import Clip, FeatureProtocol
from walt_jax.evaluation.features import Detector, digest_of, own_features
from walt_jax.evaluation.frechet import Moments
from walt_jax.evaluation.resize import cover_and_crop
from walt_jax.evaluation.video_files import read_ahead
from walt_jax.parallel.processes import divided, is_first
from walt_jax.workdir import write_atomically

CHUNK = 256  # clips in memory
KEPT = 10_000  # features that kernel distances are of
SIDE = 16  # pixels of what stands for a clip that can't be used
SAVED_EVERY = 60.0  # seconds


@dataclasses.dataclass(frozen=True)
class RealClips:
    """Windows of a source's clips: each clip once, in a random order, then each again with another window.

    Attributes:
        source: the clips.
        count: how many windows.
        seed: of the order, windows and crops.
    """

    source: Mixture
    count: int
    seed: int

    def clip(self, number: int) -> Clip | None:
        """A window; None where the clip can't be used."""
        epoch, place = divmod(number, len(self.source))
        index = int(_order(self.seed, epoch, len(self.source))[place])
        found = self.source.sample(index, np.random.default_rng([self.seed, number]))
        return None if found is None else found["video"]

    def clips(self, numbers: Sequence[int]) -> list[Clip | None]:
        """Windows, read by several threads."""
        return [clip for _, clip in read_ahead(lambda number: self.clip(int(number)), map(str, numbers))]

    def digest(self) -> str:
        """Tells these clips from others: by names, sizes and times of local files, seed and count."""
        parts = [RecordedClips.of(self.source).digest, str(self.count), str(self.seed)]
        for source in self.source.sources:
            parts += [source.split, repr(source.shapes)]
            if isinstance(source, StoredClips):
                parts.append(str(source.fps))
                for name in dict.fromkeys(source.file(index) for index in range(len(source))):
                    path = pathlib.Path(str(source.store.path)) / name
                    if path.is_file():
                        found = path.stat()
                        parts.append(f"{name} {found.st_size} {found.st_mtime_ns}")
        return digest_of(*parts)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def shrunk_to(clip: Clip, size: tuple[int, int] | None) -> Clip:
    """The centre of a clip's frames at another size, bilinear with half-pixel centres, without antialiasing; float32.

    Args:
        clip: frames.
        size: square; None leaves the clip.
    """
    return clip if size is None else cover_and_crop(clip, size[0], "half_pixel")


class Sums:
    """Mean and covariance of features that come bit by bit, and the first `KEPT` of them.

    Sums are of differences from the first features' mean, so that little is cancelled.
    """

    def __init__(self, dimension: int):
        self.read, self.count = 0, 0  # windows that were read, features that were added
        self.shift, self.total = np.zeros(dimension), np.zeros(dimension)
        self.products = np.zeros((dimension, dimension))
        self.kept = np.zeros((0, dimension), np.float32)

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        if not len(features):
            return
        if not self.count:
            self.shift = features.mean(axis=0, dtype=np.float64)
        centred = features.astype(np.float64) - self.shift[None]
        self.total += centred.sum(axis=0)
        self.products += centred.T @ centred
        self.count += len(features)
        self.kept = np.concatenate([self.kept, features[: KEPT - len(self.kept)]])

    def reference(self, ddof: int) -> Reference:
        """Of at least two features."""
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - ddof)
        return Reference(Moments(self.shift + mean, covariance, self.count), self.kept)

    def save(self, path: pathlib.Path) -> None:
        content = io.BytesIO()
        np.savez(content, **vars(self))
        write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: pathlib.Path, dimension: int) -> "Sums | None":
        """What `save` has written; None where there is nothing, or it is damaged."""
        sums = cls(dimension)
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                for name, value in vars(sums).items():
                    found = file[name]
                    if np.ndim(value) and found.shape[-1] != dimension:
                        return None
                    setattr(sums, name, found if np.ndim(value) else int(found))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return sums


def reference_of(
    real: RealClips,
    detector: Detector,
    protocol: FeatureProtocol,
    frames: int,
    size: tuple[int, int] | None,
    folder: pathlib.Path,
    what: str,
) -> tuple[Reference, str]:
    """The statistics of real clips' features: from their file where there is one, else computed; resumable.

    Args:
        real: the clips.
        detector, protocol: what features are of.
        frames: of each clip, the first ones.
        size: see `shrunk_to`.
        folder: of the files.
        what: names the clips in the progress bar.

    Returns:
        (statistics, digest): the digest of clips, protocol and network, by which the file is named.

    Raises:
        UserError: if fewer than two clips can be used.
    """
    digest = digest_of(real.digest(), detector.sha256, protocol.name, str(frames), str(size), str(KEPT))
    path = folder / f"{protocol.name}-{digest[:16]}.npz"
    sums = Sums.load(path, detector.dimension) or Sums(detector.dimension)
    saved = time.monotonic()
    try:
        for numbers in _watched(range(sums.read, real.count), real.count, what):

            def features(places: list[int], numbers: range = numbers) -> Float[np.ndarray, "n f d"]:
                clips = real.clips([numbers[place] for place in places])
                usable = [clip for clip in clips if clip is not None]
                # A clip that can't be used has features all the same, so that all processes have as many, and NaN then.
                nothing = usable[0] if usable else np.zeros((frames, SIDE, SIDE, 3), np.uint8)
                shown = [shrunk_to(nothing if clip is None else clip, size) for clip in clips]
                rows = own_features(detector, protocol, shown, frames)[..., : detector.dimension]
                if not np.isfinite(rows).all():
                    raise ValueError("a feature is not finite")
                rows[[clip is None for clip in clips]] = np.nan
                return rows

            rows = divided(len(numbers), features).reshape(-1, detector.dimension)
            sums.add(rows[np.isfinite(rows).all(axis=1)])
            sums.read = numbers.stop
            if time.monotonic() - saved > SAVED_EVERY:
                sums.save(path)
                saved = time.monotonic()
    finally:
        if sums.read:
            sums.save(path)
    if sums.count < 2:
        raise UserError(f"Of {real.count} {what} {sums.count} can be read, and a distance needs two; check the data.")
    return sums.reference(protocol.ddof), digest


def _watched(numbers: range, total: int, what: str) -> Iterator[range]:
    """Parts of `CHUNK` numbers, under a bar with rate and time left."""
    if not numbers:
        return
    hidden = not is_first()
    with tqdm.tqdm(
        desc=what, total=total, initial=numbers.start, unit="clip", dynamic_ncols=True, file=sys.stderr, disable=hidden
    ) as bar:
        for first in range(numbers.start, numbers.stop, CHUNK):
            part = range(first, min(first + CHUNK, numbers.stop))
            yield part
            bar.update(len(part))
