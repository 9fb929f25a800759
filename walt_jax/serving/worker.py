"""The thread that makes queued videos: several at once, watched, and ended when nobody wants them any more."""

import collections
import dataclasses
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from PIL import Image

import walt_jax
from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.video import ClipInfo, describe
from walt_jax.data.watchdog import Watchdog
from walt_jax.errors import UserError
from walt_jax.generation import packs
from walt_jax.generation.asking import Ask, Condition, Resolved, resolve
from walt_jax.generation.generator import Generator
from walt_jax.generation.long_video import segments
from walt_jax.generation.request import Request
from walt_jax.serving.fields import Limits
from walt_jax.serving.jobs import PREVIEW, VIDEO, Job, Jobs
from walt_jax.workdir import write_atomically

PREVIEW_SECONDS = 0.5  # at least, between two previews of a job
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
    """A job that can be made.

    Attributes:
        job: the job.
        asked: what the model is asked for.
        request: the same with prompt and seed.
    """

    job: Job
    asked: Resolved
    request: Request


class Worker(threading.Thread):
    """Makes the jobs, oldest first.

    Args:
        jobs: see `Jobs`.
        generator: the model.
        pixels: (frames, height, width) of its own clips.
        on_mesh: within, it computes.
        limits: see `Limits`.
        together: jobs that are made at once, at most.
        tags: whether videos have tags.
    """

    def __init__(
        self,
        jobs: Jobs,
        generator: Generator,
        pixels: tuple[int, int, int],
        on_mesh: Callable[[], AbstractContextManager[None]],
        limits: Limits,
        together: int,
        tags: bool = True,
    ):
        super().__init__(daemon=True, name="worker")
        self.jobs, self.generator, self.pixels, self.limits = jobs, generator, pixels, limits
        self.reader = Apart(limits.seconds / 10)
        self._on_mesh, self._together, self._tags = on_mesh, together, tags
        self._ending = False
        self.wanted: dict[str, float] = {}  # ids of jobs that someone watches, and since when
        self.counts = {"batches": 0, "videos": 0, "failed": 0, "seconds": 0.0, "evaluations": 0}

    def end(self) -> None:
        """Ends after the current evaluation; what was being made is queued when a server starts again."""
        with self.jobs.changed:
            self._ending = True
            self.jobs.changed.notify_all()

    def run(self) -> None:
        """Until `end`."""
        with self._on_mesh():
            while not self._ending:
                with self.jobs.changed:
                    waiting = self.jobs.waiting()
                    if not waiting:
                        self.jobs.changed.wait(timeout=1)
                        continue
                self._make(self._batch(waiting))

    def _batch(self, waiting: list[Job]) -> list[Job]:
        """The oldest job, and those that can be made with it: of equal settings, and of any size if the model packs.

        Of each size a power of two, so that few programs are compiled, and kept.
        """

        def settings(job: Job) -> tuple[Any, ...]:
            return job.asked["steps"], job.asked["guidance"]

        def size(job: Job) -> tuple[Any, ...]:
            return tuple(job.asked[name] for name in ("num_frames", "height", "width")), job.asked["extend"]

        oldest = waiting[0]
        if self._is_long(oldest):
            return [oldest]
        mixed = packs.can_pack(self.generator.model, self.generator.config)
        alike = [
            job
            for job in waiting
            if settings(job) == settings(oldest) and not self._is_long(job) and (mixed or size(job) == size(oldest))
        ]
        alike = alike[: self._together]
        counts = collections.Counter(map(size, alike))
        rooms = {one: 1 << (count.bit_length() - 1) for one, count in counts.items()}
        chosen = []
        for job in alike:
            if rooms[size(job)]:
                rooms[size(job)] -= 1
                chosen.append(job)
        return chosen

    def _is_long(self, job: Job) -> bool:
        frames = job.asked["num_frames"] or self.pixels[0]
        stride = self.generator.model.codec.tokenizer.config.strides[0]
        return bool(job.asked["extend"]) or 1 + (frames - 1) // stride > self.generator.longest

    def _make(self, batch: list[Job]) -> None:
        ready = [found for job in batch if (found := self._prepared(job)) is not None]
        if not ready:
            return
        try:
            self._sample(ready)
        except Gone:
            return
        except Exception as error:  # one bad job must not take others, or the server, with it
            LOG.warning("a batch failed: %s", error, exc_info=not isinstance(error, UserError | ClipError))
            if len(ready) == 1:
                self._failed(ready[0].job, error)
                return
            for one in ready:
                self._make([one.job])

    def _prepared(self, job: Job) -> Ready | None:
        """Reads what is given; a job that can't be made has failed."""
        if not self.jobs.update(job, status="in_progress", progress=0):
            return None
        asked, folder = job.asked, self.jobs.path(job)
        found = self.jobs.done_alike(job.same)
        if found is not None and self.jobs.copy_video(found, job):
            self.jobs.update(job, status="completed", progress=100, completed_at=time.time(), notes=found.notes)
            return None
        conditions = conditions_of(asked, folder)
        mask = str(folder / asked["files"]["mask"]) if "mask" in asked["files"] else None
        size = asked["num_frames"], asked["height"], asked["width"]
        try:
            resolved = resolve(
                self.generator, Ask(asked["fps"], conditions, mask, asked["extend"], *size), self.pixels, self.reader
            )
            if resolved.size[0] > self.limits.frames * self.pixels[0]:
                most = int(self.limits.frames * self.pixels[0])
                raise UserError(f"A video of {resolved.size[0]} frames would be made; at most {most} are.")
        except (UserError, ClipError) as error:
            self._failed(job, error)
            return None
        self.jobs.update(job, notes=resolved.notes)
        request = Request(asked["prompt"], asked["seed"], asked["negative_prompt"], resolved.size, resolved.given)
        return Ready(job, resolved, request)

    def _sample(self, ready: list[Ready]) -> None:
        asked = ready[0].job.asked
        config = self.generator.config
        guidance = dataclasses.replace(config.guidance, scale=asked["guidance"])
        # Padded to a power of two: a program is compiled for few numbers of clips.
        count = 1 << (len(ready) - 1).bit_length()
        config = dataclasses.replace(config, steps=asked["steps"], guidance=guidance, batch_size=count)
        generator = dataclasses.replace(self.generator, config=config)
        start = time.monotonic()
        if generator.shape(ready[0].request.size)[0] > generator.longest:
            videos = [self._long(generator, ready[0], start)]
        else:
            # In order of their sizes: packs of the same sizes share a program.
            ready.sort(key=lambda one: one.request.size)
            latents = generator.latents(
                [one.request for one in ready], bar=False, watch=self._watch(generator, ready, start)
            )
            videos = generator.decode(latents)
        self.counts["batches"] += 1
        self.counts["seconds"] += time.monotonic() - start
        for one, video in zip(ready, videos, strict=True):
            self._finish(one, video[one.asked.shown])

    def _long(self, generator: Generator, ready: Ready, start: float) -> np.ndarray:
        found: list[np.ndarray] = []
        for segment in segments(generator, ready.request, self._watch(generator, [ready], start, progress=False)):
            found.append(segment.frames)
            made = sum(map(len, found)) / ready.request.size[0]
            self.jobs.update(ready.job, progress=min(99, int(100 * made)))
        return np.concatenate(found)

    def _watch(
        self, generator: Generator, ready: list[Ready], start: float, progress: bool = True
    ) -> Callable[[list[int], int, int, Callable[[int], np.ndarray]], None]:
        shown = dict.fromkeys((one.job.id for one in ready), 0.0)

        def watch(numbers, number, count, estimate):
            self.counts["evaluations"] += 1
            there = [self.jobs.get(one.job.id) is not None for one in ready]
            if self._ending or not any(there):
                raise Gone
            if time.monotonic() - start > self.limits.seconds:
                raise UserError(f"It took longer than {self.limits.seconds:g} s, which is the server's limit.")
            for place, index in enumerate(numbers):
                job = ready[index].job
                if progress:
                    self.jobs.update(job, progress=min(99, int(100 * number / count)))
                if job.id in self.wanted and time.monotonic() - shown[job.id] > PREVIEW_SECONDS:
                    self.wanted.pop(job.id, None)
                    [frames] = dataclasses.replace(
                        generator, config=dataclasses.replace(generator.config, batch_size=1)
                    ).decode([estimate(place)])
                    write_preview(self.jobs.path(job) / PREVIEW, frames, job.asked["fps"])
                    shown[job.id] = time.monotonic()

        return watch

    def _finish(self, ready: Ready, video: np.ndarray) -> None:
        job = ready.job
        if self.jobs.get(job.id) is None:
            return
        folder = self.jobs.path(job)
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "fps", "extend", "strength")
        made = {"walt_jax": walt_jax.__version__, "generated": True}
        made |= {name: job.asked[name] for name in names if job.asked[name] not in (None, "")}
        made |= dict(zip(("num_frames", "height", "width"), video.shape, strict=False))
        tags = {"title": job.asked["prompt"], "comment": json.dumps(made, ensure_ascii=False)} if self._tags else {}
        try:
            write_video(folder / "making.mp4", video, job.asked["fps"], tags)
            write_atomically(folder / "video.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")
            (folder / "making.mp4").rename(folder / VIDEO)
            (folder / PREVIEW).unlink(missing_ok=True)
        except FileNotFoundError:  # deleted meanwhile
            return
        self.counts["videos"] += 1
        self.jobs.update(job, status="completed", progress=100, completed_at=time.time())

    def _failed(self, job: Job, error: Exception) -> None:
        self.counts["failed"] += 1
        wrong = isinstance(error, UserError | ClipError)
        message = str(error) if wrong else "The video could not be made; the server's log says why."
        code = "invalid_request" if wrong else "server_error"
        self.jobs.update(job, status="failed", completed_at=time.time(), error={"code": code, "message": message})


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
