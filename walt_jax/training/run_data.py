"""The data of a run: the clips of its stages, as pixels or as latents."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

import grain
import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from walt_jax.data.batches import Batches
from walt_jax.data.latents import REMEDY, Encoded, LatentClips, write_latents
from walt_jax.data.order import Part
from walt_jax.data.pipeline import Clips, Data, Mixture, Source
from walt_jax.data.recorded import RecordedClips
from walt_jax.data.shapes import ClipShape
from walt_jax.data.stream import numbered
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.low_res import LowRes, shrunk
from walt_jax.local_copy import copies_folder
from walt_jax.parallel.mesh import data_shards, local_shards, on_own_devices, replicated, spread_over_own_devices
from walt_jax.remote import is_remote
from walt_jax.training.checkpoint import saved_steps
from walt_jax.training.data_files import find_short, report_files
from walt_jax.training.latent_batches import Encode, Size, dense_batches, encoded_clips, latents_path
from walt_jax.training.pack_batches import Packing, packs_of_clips, packs_of_latents
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_text import RunText
from walt_jax.workdir import write_atomically

RECORDED = "clips.json"  # next to a stage's checkpoints and in a data set of latents: see `RecordedClips`


class RunData:
    """The data of a run.

    Args:
        config: see `RunConfig`.
        workdir: where latents are cached.
        codec: encodes clips.
        text: encodes captions.
        low_res: reads the base stage's tokenizer, if the denoiser upscales; returns None if it doesn't.
        mesh: the run's devices; called where batches are made.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        codec: Codec,
        text: RunText,
        low_res: Callable[[], LowRes | None],
        mesh: Callable[[], Mesh],
    ):
        self._config, self._workdir, self._codec, self._text, self._low_res = config, workdir, codec, text, low_res
        self._mesh = mesh
        self.files = Data(config.data)

    def check(self) -> None:
        """Opens all data that the run will read.

        Raises:
            UserError: if some of it can't be read, or latents don't fit on the disk.
        """
        self.unseen()
        for name in self._config.trained_stages:
            self.source(name)
            stage = self._config.stages[name]
            if stage.latents:
                LatentClips(stage.latents)
            if stage.caches and not latents_path(self._workdir, name).exists():
                self._check_room(name)

    def _check_room(self, name: str) -> None:
        count, size = self.to_encode(name)
        # Latents of a remote workdir are encoded into it, and read from a copy here.
        folder = copies_folder() if is_remote(self._workdir) else self._workdir.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if size > free:
            raise UserError(
                f"Stage {name} encodes {count:,} clips to {size / 1e9:.2g} GB of latents, and {folder} has "
                f"{free / 1e9:.2g} GB left: choose another --workdir, set --config.stages.{name}.cached_clips=N to "
                "fewer, or to 0, which encodes the clips of each batch anew."
            )

    def report_files(self) -> dict[str, Any]:
        """The state of every file of the data, of both splits; clips that are too short are found."""
        mixtures = [self.source(self._config.trained_stages[-1]), self.unseen()]
        find_short(mixtures)
        return report_files(self.files, mixtures)

    def unseen(self, shape: ClipShape | None = None) -> Source:
        """Held-out clips, in the data's shape or another.

        Of drawn ones all combinations, with other positions, sizes and speeds than in training.
        """
        split = "all" if self._config.data.source == "drawn" else "held_out"
        return self.files.source(split, (shape or self._config.clip_shape(),))

    def source(self, name: str) -> Mixture:
        """The current training clips of a stage."""
        return self.files.source("train", self._config.clip_shapes(name))

    def _recorded(self, name: str) -> Mixture:
        """The training clips of a stage, as recorded next to its checkpoints.

        If files were added or removed since the stage began, its order stays, and a warning lists them.
        """
        mixture, folder = self.source(name), self._workdir / "checkpoints" / name
        file = folder / RECORDED
        if not (file.exists() and saved_steps(self._workdir, name)):
            write_atomically(file, RecordedClips.of(mixture).to_json())
            return mixture
        remedy = "restore it, or remove it to go on with the files that are there now, in another order"
        mixture, changes = RecordedClips.load(file, remedy).apply(mixture)
        _warn(changes, f"since stage {name} began", "added ones are read by stages that begin later")
        return mixture

    def gone(self) -> list[str]:
        """The files that have vanished since they were checked."""
        return [str(store.path / file) for store in self.files.stores.values() for file in list(store.gone)]

    def of_nominal_size(self) -> Source:
        """The training clips in the data's own shape."""
        return self.files.source("train", (self._config.clip_shape(),))

    def batches(self, name: str) -> grain.IterDataset:
        """A stage's batches of clips of equal shape."""
        batches = Batches(self.clips(name), self._config.batch_sizes(name), self._part())
        if self._config.stages[name].task == "tokenizer":
            return batches
        text, low_res = self._text.frozen(), self._encode_low_res()
        if text is not None:
            batches = batches.map(lambda batch: {**batch, "text": text.read(batch["text"])})
        if low_res is not None:
            batches = batches.map(lambda batch: {**batch, "low_res": low_res(batch["video"])})
        return batches

    def clips(self, name: str) -> Clips:
        """A stage's clips in its shapes, by their number in the order."""
        encode = self._text.captions().encode if self._config.stages[name].task == "denoiser" else None
        data = self._config.data
        return Clips(self._recorded(name), self._seed(name), encode, data.caption_dropout, data.flips)

    def _seed(self, name: str) -> int:
        return self._config.seed + list(self._config.stages).index(name)

    def to_encode(self, name: str) -> tuple[int, int]:
        """The number of clips that a stage encodes before its first step, and the expected size of their latents."""
        count = self._config.stages[name].cached_clips or len(self.source(name))
        return count, round(count * self._config.latents_bytes(name))

    def encode(self, out: epath.PathLike, name: str, count: int, tokenizer: TrainedTokenizer) -> dict[str, Any]:
        """Writes a data set of latents of a stage's clips.

        Args:
            out: the folder of the data set, see `data.latents`.
            name: of the stage.
            count: number of clips, in the stage's order; windows and crops are drawn again each epoch. 0: one epoch.
            tokenizer: encodes the clips.

        Returns:
            The content of `encode.json`.

        Raises:
            UserError: if the folder holds something else, or no clip can be encoded.
        """
        config, source, seed = self._config, self.source(name), self._seed(name)
        recorded = RecordedClips.of(source)
        if (epath.Path(out) / RECORDED).exists():
            recorded = RecordedClips.load(epath.Path(out) / RECORDED, REMEDY)
            source, changes = recorded.apply(source)
            _warn(changes, f"since {out} was begun", "added ones are not encoded; that takes a new data set")
        clips = Clips(source, seed, encode=list)  # texts instead of ids
        count = count or len(source)
        data = {knob: getattr(config.data, knob) for knob in ("source", "captions", "fps")}
        shapes = [dataclasses.astuple(shape) for shape in config.clip_shapes(name)]
        identity = {"tokenizer": digest(tokenizer), "seed": seed, **data, "shapes": json.loads(json.dumps(shapes))}
        identity["clips"] = recorded.digest
        encode, low_res = self._encode(tokenizer), self._encode_low_res()
        read = embed = empty = None
        if (text := self._text.digest()) is not None:
            identity["text"] = text
            read = functools.cache(self._text.frozen)  # large; not loaded if all is encoded already
            embed, empty = (lambda captions: read().each(captions)), (lambda: read().each([""])[0])
        small = self._low_res()
        if small is not None:
            identity["low_res"] = digest(small.tokenizer)
        with (
            on_own_devices() if jax.process_count() > 1 else contextlib.nullcontext(),
            # Not shown where all are there already.
            tqdm.tqdm(total=count, desc="encoding clips", unit="clip", delay=0.5, dynamic_ncols=True) as progress,
        ):

            def encoded(numbers: range) -> Iterable[Encoded]:
                progress.update(numbers.start - progress.n)  # also counts clips that were done before or are unusable
                some = numbered(clips, numbers)
                devices = jax.local_device_count()
                return encoded_clips(encode, some, progress.update, embed, low_res, devices=devices)

            return write_latents(out, identity, count, encoded, empty, {RECORDED: recorded.to_json()})

    def _encode_low_res(self) -> Encode | None:
        """Encodes clips at low resolution; None where the denoiser doesn't read them."""
        small = self._low_res()
        if small is None:
            return None
        encode = _on_own_devices(small.codec, small.tokenizer)
        return lambda video: encode(shrunk(video, small.scale))

    def _encode(self, tokenizer: TrainedTokenizer) -> Encode:
        return _on_own_devices(self._codec, tokenizer)

    def encoded(self, name: str, tokenizer: TrainedTokenizer) -> grain.IterDataset:
        """A stage's batches of cached latents: of equal size, or packs. Encodes them first if they aren't cached.

        Raises:
            UserError: if there are latents of other sizes than the stage's.
        """
        config, stage = self._config, self._config.stages[name]
        path = stage.latents or latents_path(self._workdir, name)
        if stage.caches:
            self.encode(path, name, stage.cached_clips or 0, tokenizer)
        low_res = self._low_res()
        clips = LatentClips(
            path,
            config.data.cache_bytes,
            digest(tokenizer),
            self._text.digest(),
            None if low_res is None else digest(low_res.tokenizer),
        )
        read_captions = self._text.reader(clips.empty)
        if stage.pack is None:
            dropout, seed = config.data.caption_dropout, self._seed(name)
            return dense_batches(clips, read_captions, dropout, self._sizes(name), seed, self._part())
        t, h, w = (bound * size for bound, size in zip(config.bounds(name), config.denoiser.patch_size, strict=True))
        if (clips.sizes > np.array([t, h, w])).any():
            raise UserError(
                f"{path} holds latents of up to {' × '.join(map(str, clips.sizes.max(0)))}, and stages.{name} has "
                f"clips of at most {t} × {h} × {w}; give the stage the shapes that were encoded."
            )
        return packs_of_latents(clips, read_captions, self._packing(name))

    def packs(self, name: str, tokenizer: TrainedTokenizer) -> grain.IterDataset:
        """A stage's batches of packs of clips that are encoded for each batch."""
        config, text, encode_clips = self._config, self._text.frozen(), self._encode(tokenizer)
        embed = empty = None
        if text is not None:
            embed, empty = text.each, text.each([""])[0]

        def encode(clips: list[dict[str, Any]]) -> list[Encoded]:
            encoded = encoded_clips(encode_clips, clips, lambda count: None, embed, smallest=1)
            by_number = dict(zip(sorted(clip["number"] for clip in clips), encoded, strict=True))
            return [by_number[clip["number"]] for clip in clips]

        return packs_of_clips(
            Clips(self._recorded(name), self._seed(name), encode=list),  # texts instead of ids
            lambda size: config.tokenizer.latent_shape(*size)[:3],
            config.latent_sizes(name),
            encode,
            config.tokenizer.latent_channels,
            self._text.reader(empty),
            self._packing(name),
        )

    def _packing(self, name: str) -> Packing:
        config, stage = self._config, self._config.stages[name]
        return Packing(
            config.denoiser_of(name),
            stage.batch_size,
            stage.pack.tokens,
            stage.pack.clips,
            self._seed(name),
            config.data.caption_dropout,
            stage.pack.drop,
            stage.pack.frames,
            data_shards(self._mesh()) * stage.accumulate,  # micro-batches have their own
            stage.pack.packers,
            self._part(),
        )

    def _part(self) -> Part:
        """The rows of each batch that this process's devices need."""
        mesh = self._mesh()
        return Part(local_shards(mesh), data_shards(mesh))

    def _sizes(self, name: str) -> dict[Size, int]:
        """Clips per batch for each size of a stage's latents; of shapes with equal sizes, the first one's."""
        shapes = zip(self._config.clip_shapes(name), self._config.batch_sizes(name), strict=True)
        sizes: dict[Size, int] = {}
        for shape, batch_size in shapes:
            for latents in self._config.latent_shapes(shape):
                sizes.setdefault(latents[:3], batch_size)
        return sizes


def _warn(changes: list[str], since: str, added: str) -> None:
    """Prints what has changed, and what follows."""
    for change in changes:
        print(f"warning: {change} {since}; the order is kept: removed clips are skipped, {added}.", file=sys.stderr)


def _on_own_devices(codec: Codec, tokenizer: TrainedTokenizer) -> Encode:
    """Encodes clips on this process's devices: processes encode different clips at different times."""
    if jax.process_count() > 1 or jax.local_device_count() > 1:
        with on_own_devices() as mesh:
            tokenizer = jax.device_put(jax.device_get(tokenizer), replicated(mesh))
    encode = spread_over_own_devices(lambda tokenizer, video: codec.encode(tokenizer, video)[0])
    return lambda video: np.asarray(encode(tokenizer, video))


def digest(tokenizer: TrainedTokenizer) -> str:
    """Identifies a tokenizer's weights and statistics."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tokenizer):
        hashed.update(jax.tree_util.keystr(path).encode())
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()[:16]
