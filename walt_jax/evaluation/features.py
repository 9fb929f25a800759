"""Runs a metric's network over clips: in batches, on all devices of this process, with a cache on disk."""

import dataclasses
import functools
import hashlib
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from walt_jax.evaluation import i3d, inception
from walt_jax.evaluation.feature_protocol import FeatureProtocol
from walt_jax.parallel.mesh import on_own_devices
from walt_jax.parallel.processes import divided
from walt_jax.weight_files import Tensors, read_tensors
from walt_jax.workdir import write_atomically

Clip = UInt8[np.ndarray, "t h w 3"]

BATCH = 8  # clips at once on each device
KEPT_EVERY = 64  # clips: after so many new features a file of the cache is written


@dataclasses.dataclass(frozen=True)
class Detector:
    """A network whose features are compared.

    Attributes:
        name: stands beside each number.
        sha256: of its weights.
        dimension: of the features that are compared; what a row has after them are a classifier's logits.
        shortest: frames that a clip needs.
        compute: batch of prepared clips to features, compiled.
        longest: frames that it takes at most; None is any number.
    """

    name: str
    sha256: str
    dimension: int
    shortest: int
    compute: Callable[[Float[Array, "b t h w 3"]], Float[Array, "b d"]]
    longest: int | None = None

    def refusal(self, frames: int) -> str | None:
        """Why clips of so many frames can't be measured; None where they can."""
        if frames < self.shortest:
            return f"{frames} is too short: {self.name} needs {self.shortest} frames"
        if self.longest is not None and frames > self.longest:
            return f"{frames} is too long: {self.name} takes {self.longest} frames"
        return None


def i3d_detector(path: pathlib.Path) -> Detector:
    """I3D's logits.

    Raises:
        UserError: if the file does not hold its weights.
    """
    tensors, digest = read_tensors(path)
    weights = i3d.weights_from(tensors, str(path))
    compute = functools.partial(jax.jit(i3d.logits), weights)
    return Detector("I3D (Kinetics-400), logits averaged over time", digest, i3d.CLASSES, i3d.SHORTEST, compute)


def inception_detector(path: pathlib.Path) -> Detector:
    """FID's features of single frames, and after them the logits of the inception score.

    Raises:
        UserError: if the file does not hold its weights.
    """
    tensors, digest = read_tensors(path)
    weights = inception.weights_from(tensors, str(path))

    @jax.jit
    def compute(weights, images: Float[Array, "b 1 h w 3"]) -> Float[Array, "b 3056"]:
        return jnp.concatenate(inception.features_and_logits(weights, images[:, 0]), axis=-1)

    name = "Inception v3 of 2015-12-05, its last average pooling"
    return Detector(name, digest, inception.FEATURES, 1, functools.partial(compute, weights))


class FeatureCache:
    """Features of clips by the digest of what they were computed from; a stopped command resumes from it.

    Files are only added, each with the features of some clips, so that writing costs no more as the cache grows.
    """

    def __init__(self, folder: pathlib.Path | None):
        """
        Args:
            folder: made when something is written; damaged files in it are ignored, and their features computed again.
                None keeps features in memory alone.
        """
        self.folder, self.rows, self._new = folder, {}, {}
        self._next = 0
        for path in sorted(folder.glob("*.npz")) if folder is not None and folder.is_dir() else ():
            self._next = max(self._next, int(path.stem) + 1 if path.stem.isdigit() else 0)
            try:
                with path.open("rb") as opened, np.load(opened) as file:
                    self.rows.update(zip(file["keys"].tolist(), file["features"], strict=True))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue

    def put(self, key: str, row: Float[np.ndarray, " d"]) -> None:
        self.rows[key] = self._new[key] = row
        if len(self._new) >= KEPT_EVERY:
            self.keep()

    def keep(self) -> None:
        """Writes what is new."""
        if not self._new or self.folder is None:
            return
        content = io.BytesIO()
        np.savez(content, keys=np.array(list(self._new)), features=np.stack(list(self._new.values())))
        write_atomically(self.folder / f"{self._next:06d}.npz", content.getvalue())
        self._next, self._new = self._next + 1, {}


def read_together(files: Sequence[pathlib.Path]) -> tuple[Tensors, str]:
    """The tensors of a network that is kept in one file or several, and their digest: of one file, that of its bytes.

    Raises:
        UserError: if a file can't be read, see `weight_files.read_tensors`.
    """
    tensors, digests = {}, []
    for file in files:
        found, digest = read_tensors(file)
        tensors |= found
        digests.append(digest)
    return tensors, digests[0] if len(digests) == 1 else digest_of(*digests)


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 of several strings, which can't be confused with others that they join to."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()


def compute_features(
    detector: Detector,
    prepare: Callable[[Clip], Float[np.ndarray, "t h w 3"]],
    clips: Iterable[tuple[str, Clip]],
    cache: FeatureCache,
) -> Iterator[str]:
    """Enters the features of clips into the cache, and yields each one's key when it is there.

    Args:
        detector: the network, made on this process's devices, as `distances.choose` does.
        prepare: resizes a clip and maps it to the network's range; all results have one shape.
        clips: (key, clip); what the cache has already is left out by the caller.
        cache: gets the features; it is written after every KEPT_EVERY clips, at the end, and when the caller stops.
    """
    size = BATCH * jax.local_device_count()
    batch: list[tuple[str, Float[np.ndarray, "t h w 3"]]] = []

    def flush() -> Iterator[str]:
        keys = [key for key, _ in batch]
        # Padded, so that one shape is compiled.
        index = np.minimum(np.arange(size), len(batch) - 1)
        with on_own_devices() as mesh:
            clips = jax.device_put(np.stack([batch[i][1] for i in index]), NamedSharding(mesh, PartitionSpec("data")))
            values = np.asarray(detector.compute(clips))
        batch.clear()
        for key, row in zip(keys, values, strict=False):
            cache.put(key, row)
            yield key

    try:
        for key, clip in clips:
            batch.append((key, prepare(clip)))
            if len(batch) == size:
                yield from flush()
        if batch:
            yield from flush()
    finally:
        cache.keep()


def features_of(
    detector: Detector, protocol: FeatureProtocol, clips: Sequence[Clip], frames: int | None = None
) -> Float[np.ndarray, "n d"]:
    """The features of clips in memory, in their order: a row each, or of images a row for each frame.

    All processes pass the same clips; each computes a part.

    Args:
        detector, protocol: the network and what it gets.
        clips: all of one size.
        frames: of each clip, the first ones; None takes all.
    """
    rows = divided(len(clips), lambda some: own_features(detector, protocol, [clips[i] for i in some], frames))
    return rows.reshape(-1, rows.shape[-1])


def own_features(
    detector: Detector, protocol: FeatureProtocol, clips: Sequence[Clip], frames: int | None = None
) -> Float[np.ndarray, "n f d"]:
    """The features of clips in memory, computed by this process: one row each, or of images one for each frame.

    Args:
        detector, protocol, clips, frames: as those of `features_of`.
    """
    cache = FeatureCache(None)
    parts = [part for clip in clips for part in protocol.parts(clip[:frames])]
    keyed = ((str(number), part) for number, part in enumerate(parts))
    keys = list(compute_features(detector, protocol.prepare, keyed, cache))
    return np.stack([cache.rows[key] for key in keys]).reshape(len(clips), len(parts) // len(clips), -1)
