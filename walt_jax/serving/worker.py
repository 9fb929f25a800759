"""The thread that makes queued videos: several at once, watched, and ended when nobody wants them any more."""

import dataclasses
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from PIL import Image

from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.video import ClipInfo, describe
from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError
from walt_jax.generation import packs, provenance
from walt_jax.generation.asking import Ask, Condition, Resolved, resolve
from walt_jax.generation.codec import Codec
from walt_jax.generation.content_credentials import Sign
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import LatentDiffusion
from walt_jax.generation.long_video import segments
from walt_jax.generation.request import Request
from walt_jax.serving.fields import Limits
from walt_jax.serving.jobs import PREVIEW, SIDECAR, VIDEO, Job, Jobs

PREVIEW_SECONDS = 0.5  # at least, between two previews of a job
GATHER_SECONDS = 0.1  # requests that come together are made together
PROGRAMS = 16  # that are kept: clients choose sizes, and each, or each shape of a pack, is compiled; 15 to 100 MiB each
LOG = logging.getLogger("walt_jax.serving")


class Gone(Exception):
    """All videos of a batch were deleted, or the server ends."""


class Apart:
    """Reads files in processes of their own, under limits.

    Args:
        seconds: for a file.
    """

    def __init__(self, seconds: float):
        self._watchdog = Watchdog()
        self._limits = DecodeLimits(
            longest_side=2**13, pixels=2**25, packets=100_000, clip_bytes=2**29, wall_seconds=seconds
        )

    def describe(self, path: str) -> ClipInfo:
        """See `video.describe`."""
        return self._watchdog.call(self._limits.wall_seconds + 1, describe, str(path), limits=self._limits)

    def read_clip(self, path: str, *args: Any, **kwargs: Any) -> np.ndarray:
        """See `video.read_clip`."""
        return self._watchdog.read_clip(str(path), *args, limits=self._limits, **kwargs)


@dataclasses.dataclass
class Ready:
    """A video that can be made.

    Attributes:
        jobs: those that ask for it.
        asked: what the model is asked for.
        request: the same with prompt and seed.
    """

    jobs: list[Job]
    asked: Resolved
    request: Request


@dataclasses.dataclass
class Pace:
    """How a video gets on; times are those of a monotonic clock.

    Attributes:
        start, first: when the first evaluation had ended, and the fraction that was done then.
        at, done: the same of the last one so far.
    """

    start: float
    first: float
    at: float
    done: float


class Worker(threading.Thread):
    """Makes the jobs, oldest first.

    Args:
        jobs: see `Jobs`.
        generator: the model.
        pixels: (frames, height, width) of its own clips.
        on_mesh: within, it computes.
        limits: see `Limits`.
        together: videos that are made at once, at most.
        model: what made them, for their files: {"model": name, …}.
        tags: whether videos have tags.
        sign: signs each file, see `content_credentials`; None leaves them unsigned.
    """

    def __init__(
        self,
        jobs: Jobs,
        generator: Generator,
        pixels: tuple[int, int, int],
        on_mesh: Callable[[], AbstractContextManager[None]],
        limits: Limits,
        together: int,
        model: dict[str, Any],
        tags: bool = True,
        sign: Sign | None = None,
    ):
        super().__init__(daemon=True, name="worker")
        self.jobs, self.generator, self.pixels, self.limits = jobs, generator, pixels, limits
        self.reader = Apart(limits.seconds / 10)
        self._on_mesh, self._together, self._model, self._tags, self._sign = on_mesh, together, model, tags, sign
        self._ending = False
        self.wanted: set[str] = set()  # ids of jobs that someone watches
        self._paces: dict[str, Pace] = {}  # of jobs whose first evaluation has ended
        self.counts = dict.fromkeys(("batches", "videos", "failed", "evaluations"), 0) | dict.fromkeys(
            ("seconds", "sampling_seconds", "decoding_seconds"), 0.0
        )

    def stage(self, job: Job) -> str | None:
        """What is done for a job that is being made: "starting", "sampling" or "decoding"."""
        if job.status != "in_progress":
            return None
        pace = self._paces.get(job.id)
        # Programs of a new size are compiled before the first evaluation ends, which may take longer than all of them.
        return "starting" if pace is None else "sampling" if pace.done < 1 else "decoding"

    def seconds_left(self, job: Job) -> float | None:
        """Of sampling a video, by its pace since its first evaluation; None where that is not known."""
        pace = self._paces.get(job.id)
        if job.status != "in_progress" or pace is None or not pace.first < pace.done < 1:
            return None
        each = (pace.at - pace.start) / (pace.done - pace.first)
        return round(max(0.0, each * (1 - pace.done) - (time.monotonic() - pace.at)), 1)

    def end(self) -> None:
        """Ends after the current evaluation; what was being made is queued when a server starts again."""
        with self.jobs.changed:
            self._ending = True
            self.jobs.changed.notify_all()

    def run(self) -> None:
        """Until `end`."""
        leaving: threading.Thread | None = None
        while not self._ending:
            with self.jobs.changed:
                if not self.jobs.waiting():
                    self.jobs.changed.wait(timeout=1)
                    continue
            time.sleep(GATHER_SECONDS)
            batch = self._batch(self.jobs.waiting())
            making = threading.Thread(target=self._on_device, args=(batch,), daemon=True, name="batch")
            making.start()
            if leaving is not None:  # one at most, whatever is cancelled
                leaving.join()
            leaving = making if self._all_gone(batch, making) else None

    def _all_gone(self, batch: list[Job], making: threading.Thread) -> bool:
        """Waits for a batch; True as soon as all of it is deleted, while its thread may still compile.

        XLA does not stop compiling. The next batch does not wait for that, and the thread ends before it evaluates.
        """
        while making.is_alive() and not self._ending:
            if not any(self.jobs.get(job.id) for job in batch):
                return True
            with self.jobs.changed:
                self.jobs.changed.wait(timeout=0.2)
            making.join(0.01)
        return False

    def _on_device(self, batch: list[Job]) -> None:
        with self._on_mesh():
            self.make_some(batch)

    def make_some(self, batch: list[Job] | None = None) -> None:
        """Makes a batch; by default the oldest job, and those that can be made with it."""
        batch = self._batch(self.jobs.waiting()) if batch is None else batch
        try:
            self._make(batch)
        except Exception as error:  # the next ones are made all the same
            LOG.exception("a batch failed")
            for job in batch:
                if job.status == "in_progress":
                    self._failed(job, error)
        finally:
            for job in batch:
                self._paces.pop(job.id, None)

    def _batch(self, waiting: list[Job]) -> list[Job]:
        """The oldest job, and those that can be made with it: of equal settings, and of any size if the model packs.

        Of one size a power of two, so that few programs are compiled; the shapes of packs are few themselves.
        """

        def settings(job: Job) -> tuple[Any, ...]:
            return job.asked["steps"], job.asked["guidance"]

        def size(job: Job) -> tuple[Any, ...]:
            return tuple(job.asked[name] for name in ("num_frames", "height", "width"))

        if not waiting:
            return []
        oldest = waiting[0]
        if self._is_long(oldest):
            return [job for job in waiting if job.same == oldest.same]
        mixed = packs.can_pack(self.generator.model, self.generator.config)
        videos: dict[str, list[Job]] = {}
        for job in waiting:
            alike = settings(job) == settings(oldest) and (mixed or size(job) == size(oldest))
            room = job.same in videos or len(videos) < self._together
            if alike and room and not self._is_long(job):
                videos.setdefault(job.same, []).append(job)
        found = list(videos.values())
        if len({size(jobs[0]) for jobs in found}) == 1:
            found = found[: 1 << (len(found).bit_length() - 1)]
        return [job for jobs in found for job in jobs]

    def _is_long(self, job: Job) -> bool:
        frames = job.asked["num_frames"] or self.pixels[0]
        stride = self.generator.model.codec.tokenizer.config.strides[0]
        return bool(job.asked["extend"]) or 1 + (frames - 1) // stride > self.generator.longest

    def _make(self, batch: list[Job]) -> None:
        videos: dict[str, Ready] = {}
        for job in batch:
            if job.same in videos:
                if self.jobs.update(job, status="in_progress", progress=0, notes=videos[job.same].asked.notes):
                    videos[job.same].jobs.append(job)
            elif (found := self._prepared(job)) is not None:
                videos[job.same] = found
        if not videos:
            return
        try:
            self._sample(list(videos.values()))
        except Gone:
            return
        except Exception as error:  # one bad job must not take others with it
            LOG.warning("a batch failed: %s", error, exc_info=not isinstance(error, UserError | ClipError))
            for ready in videos.values():
                there = [job for job in ready.jobs if job.status == "in_progress"]
                if len(videos) == 1:
                    for job in there:
                        self._failed(job, error)
                elif there:
                    self._make(there)

    def _prepared(self, job: Job) -> Ready | None:
        """Reads what is given; a job that can't be made has failed."""
        self._paces.pop(job.id, None)  # of a batch that failed
        if not self.jobs.update(job, status="in_progress", progress=0):
            return None
        asked, folder = job.asked, self.jobs.path(job)
        found = self.jobs.done_alike(job.same)
        if found is not None and self.jobs.copy_video(found, job):
            self._completed(job, found.frames, found.notes)
            return None
        conditions = conditions_of(asked, folder)
        mask = str(folder / asked["files"]["mask"]) if "mask" in asked["files"] else None
        size = asked["num_frames"], asked["height"], asked["width"]
        ask = Ask(asked["fps"], conditions, mask, asked["extend"], *size, asked["motion"])
        try:
            resolved = resolve(self.generator, ask, self.pixels, self.reader)
            if resolved.size[0] > self.limits.frames * self.pixels[0]:
                most = int(self.limits.frames * self.pixels[0])
                raise UserError(f"A video of {resolved.size[0]} frames would be made; at most {most} are.")
        except Exception as error:  # uploads are anything
            if not isinstance(error, UserError | ClipError):
                LOG.exception("what is given of %s could not be prepared", job.id)
            self._failed(job, error)
            return None
        frames = len(range(*resolved.shown.indices(resolved.size[0])))
        self.jobs.update(job, notes=resolved.notes, frames=frames)
        request = Request(asked["prompt"], asked["seed"], asked["negative_prompt"], resolved.size, resolved.given)
        return Ready([job], resolved, request)

    def _sample(self, ready: list[Ready]) -> None:
        asked = ready[0].jobs[0].asked
        config = self.generator.config
        guidance = dataclasses.replace(config.guidance, scale=asked["guidance"])
        # Padded to a power of two: a program is compiled for few numbers of clips.
        count = 1 << (len(ready) - 1).bit_length()
        config = dataclasses.replace(config, steps=asked["steps"], guidance=guidance, batch_size=count)
        generator = dataclasses.replace(self.generator, config=config)
        decoder = dataclasses.replace(generator, config=dataclasses.replace(config, batch_size=1))
        self._forget_programs()
        start = time.monotonic()
        if generator.shape(ready[0].request.size)[0] > generator.longest:
            made = [self._long(generator, ready[0], start)]
        else:
            # In order of their sizes: packs of the same sizes share a program.
            ready.sort(key=lambda one: one.request.size)
            made = generator.latents(
                [one.request for one in ready], bar=False, watch=self._watch(generator, ready, start)
            )
        sampled = time.monotonic()
        self.counts["sampling_seconds"] += sampled - start
        for one, video in zip(ready, made, strict=True):
            before = time.monotonic()
            if video.dtype != np.uint8:
                # One by one: a program for each size, not for each number of videos too; previews have the same.
                [video] = decoder.decode([video])
            self.counts["decoding_seconds"] += time.monotonic() - before
            self._finish(one, video[one.asked.shown])
        self.counts["batches"] += 1
        self.counts["seconds"] += time.monotonic() - start

    def _forget_programs(self) -> None:
        """Memory does not grow with all that clients have asked for: now and then programs are loaded anew."""
        if programs() >= PROGRAMS:
            jax.clear_caches()

    def _long(self, generator: Generator, ready: Ready, start: float) -> np.ndarray:
        found: list[np.ndarray] = []
        for segment in segments(generator, ready.request, self._watch(generator, [ready], start, progress=False)):
            found.append(segment.frames)
            made = sum(map(len, found)) / ready.request.size[0]
            for job in ready.jobs:
                self._advance(job, made)
        return np.concatenate(found)

    def _watch(
        self, generator: Generator, ready: list[Ready], start: float, progress: bool = True
    ) -> Callable[[list[int], int, int, Callable[[int], np.ndarray]], None]:
        shown = [0.0 for _ in ready]
        decoder = dataclasses.replace(generator, config=dataclasses.replace(generator.config, batch_size=1))

        def watch(numbers, number, count, estimate):
            self.counts["evaluations"] += 1
            if self._ending or not any(self.jobs.get(job.id) for one in ready for job in one.jobs):
                raise Gone
            if time.monotonic() - start > self.limits.seconds:
                raise UserError(f"It took longer than {self.limits.seconds:g} s, which is the server's limit.")
            for place, index in enumerate(numbers):
                jobs = ready[index].jobs
                if progress:
                    for job in jobs:
                        self._advance(job, number / count)
                watched = [job for job in jobs if job.id in self.wanted]
                if watched and time.monotonic() - shown[index] > PREVIEW_SECONDS:
                    [frames] = decoder.decode([estimate(place)])
                    for job in watched:
                        self.wanted.discard(job.id)
                        write_preview(self.jobs.path(job) / PREVIEW, frames, job.asked["fps"])
                    shown[index] = time.monotonic()

        return watch

    def _advance(self, job: Job, done: float) -> None:
        now = time.monotonic()
        pace = self._paces.setdefault(job.id, Pace(now, done, now, done))
        pace.at, pace.done = now, done
        self.jobs.update(job, progress=min(99, int(100 * done)))

    def _finish(self, ready: Ready, video: np.ndarray) -> None:
        first = next((job for job in ready.jobs if self.jobs.get(job.id) is not None), None)
        if first is None:
            return
        folder, asked = self.jobs.path(first), first.asked
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "fps", "extend", "strength", "motion")
        settings = {name: asked[name] for name in names if asked[name] not in (None, "")}
        settings |= dict(zip(("num_frames", "height", "width"), video.shape, strict=False))
        if asked["files"]:
            settings["given"] = sorted(asked["files"])
        made = provenance.made({**self._model, "sampler": self.generator.config.sampler, **settings})
        try:
            making = folder / "making.mp4"
            write_video(making, video, asked["fps"], provenance.tags(asked["prompt"], made) if self._tags else {})
            if self._sign is not None:
                self._sign(making, made)
            provenance.write_sidecar(folder / SIDECAR, making, made)
            making.replace(folder / VIDEO)
            (folder / PREVIEW).unlink(missing_ok=True)
        except FileNotFoundError:  # deleted meanwhile
            if len(ready.jobs) > 1:
                self._finish(dataclasses.replace(ready, jobs=[job for job in ready.jobs if job is not first]), video)
            return
        self.counts["videos"] += 1
        self._completed(first, len(video), first.notes)
        for job in ready.jobs:
            if job is not first and self.jobs.copy_video(first, job):
                self._completed(job, len(video), first.notes)

    def _completed(self, job: Job, frames: int | None, notes: list[str]) -> None:
        self.wanted.discard(job.id)
        self.jobs.update(job, status="completed", progress=100, completed_at=time.time(), frames=frames, notes=notes)

    def _failed(self, job: Job, error: Exception) -> None:
        self.counts["failed"] += 1
        self.wanted.discard(job.id)
        wrong = isinstance(error, UserError | ClipError)
        message = str(error) if wrong else "The video could not be made; the server's log says why."
        code = "invalid_request" if wrong else "server_error"
        try:
            self.jobs.update(job, status="failed", completed_at=time.time(), error={"code": code, "message": message})
        except OSError:  # a full disk: known until the server ends
            LOG.exception("%s has failed, which could not be written", job.id)


def programs() -> int:
    """How many large programs are compiled and kept: of samplers, encoders and decoders."""
    # JAX has no public name for it.
    return sum(each._cache_size() for each in (LatentDiffusion._step, Codec.encode, Codec.decode))


def conditions_of(asked: dict[str, Any], folder: pathlib.Path) -> list[Condition]:
    """What a job's uploads give: its clip or first picture, and its last picture."""
    files, found = asked["files"], []
    for name in ("input_reference", "image", "video"):
        if name in files:
            found.append(Condition(str(folder / files[name]), 0, asked["strength"], picture=name == "image"))
    if "last_image" in files:
        found.append(Condition(str(folder / files["last_image"]), -1, picture=True))
    return found


def write_preview(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    """An animation of few bytes."""
    pictures = [Image.fromarray(frame) for frame in frames[:: max(1, len(frames) // 24)]]
    making = path.with_suffix(".making.webp")
    try:
        duration = round(1000 * len(frames) / len(pictures) / fps)
        pictures[0].save(
            making, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=60, method=0
        )
        making.replace(path)
    except FileNotFoundError:  # deleted meanwhile
        pass
