"""Videos that were asked for, each in a folder of its own; what is there when the server starts goes on."""

import dataclasses
import hashlib
import json
import pathlib
import re
import secrets
import shutil
import threading
import time
from typing import Any, Literal

from walt_jax.workdir import write_atomically

Status = Literal["queued", "in_progress", "completed", "failed"]
RECORD, VIDEO, SIDECAR, PREVIEW = "job.json", "video.mp4", "video.json", "preview.webp"
NAME = re.compile("video_[0-9a-f]{24}")  # of a job's folder


@dataclasses.dataclass
class Job:
    """A video that was asked for.

    Attributes:
        id: made here, never by a client.
        asked: what for, see `fields.read`; names of uploads are those of files in the job's folder.
        created_at, completed_at: seconds since 1970.
        progress: 0..100.
        error: {"code", "message"} of a failed one.
        same: tells equal requests to the same model.
        group: the same without the seed: requests that differ in it alone are shown next to each other.
        notes: what was changed to make what is given fit.
        frames: of the video, once they are known.
    """

    id: str
    asked: dict[str, Any]
    created_at: float
    status: Status = "queued"
    progress: int = 0
    completed_at: float | None = None
    error: dict[str, str] | None = None
    same: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    frames: int | None = None
    group: str = ""

    def __post_init__(self):
        self.asked.setdefault("motion", 0.0)  # of older videos


class Jobs:
    """All jobs, in memory and in a folder; thread-safe.

    Args:
        folder: a folder for each job; those that were being made when a server ended are queued again. What a request
            or a deletion that did not end has left is removed.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.changed = threading.Condition()
        self._jobs: dict[str, Job] = {}  # oldest first
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in folder.iterdir():
            if not NAME.fullmatch(path.name):
                continue
            if not (path / RECORD).exists():
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                job = Job(**json.loads((path / RECORD).read_text(encoding="utf-8")))
            except (ValueError, TypeError, OSError):
                continue  # of a later version
            if job.id != path.name:
                continue
            if job.status == "in_progress" or (job.status == "completed" and not (path / VIDEO).exists()):
                job.status, job.progress, job.completed_at = "queued", 0, None
            found.append(job)
        self._jobs = {job.id: job for job in sorted(found, key=lambda job: (job.created_at, job.id))}

    def path(self, job: Job) -> pathlib.Path:
        """The job's folder."""
        return self.folder / job.id

    def new_folder(self) -> tuple[str, pathlib.Path]:
        """An id, and its folder, for uploads before the job is added."""
        name = f"video_{secrets.token_hex(12)}"  # matches `NAME`
        (self.folder / name).mkdir()
        return name, self.folder / name

    def add(self, job: Job) -> None:
        """Queues a job; its folder is there."""
        with self.changed:
            self._jobs[job.id] = job
            self._write(job)
            self.changed.notify_all()

    def update(self, job: Job, **values: Any) -> bool:
        """Changes a job, if it is not deleted; only a changed status is written to disk."""
        with self.changed:
            if job.id not in self._jobs:
                return False
            changed = values.get("status", job.status) != job.status
            for name, value in values.items():
                setattr(job, name, value)
            if changed:
                self._write(job)
            self.changed.notify_all()
            return True

    def _write(self, job: Job) -> None:
        write_atomically(self.path(job) / RECORD, json.dumps(dataclasses.asdict(job), ensure_ascii=False) + "\n")

    def get(self, name: str) -> Job | None:
        """The job of an id."""
        with self.changed:
            return self._jobs.get(name)

    def all(self) -> list[Job]:
        """Oldest first."""
        with self.changed:
            return list(self._jobs.values())

    def waiting(self) -> list[Job]:
        """Those that are queued, oldest first."""
        return [job for job in self.all() if job.status == "queued"]

    def done_alike(self, same: str) -> Job | None:
        """A finished job that asked for the same."""
        with self.changed:
            return next((job for job in self._jobs.values() if job.same == same and job.status == "completed"), None)

    def delete(self, job: Job) -> None:
        """Forgets a job and its files; what makes it finds it gone."""
        with self.changed:
            self._jobs.pop(job.id, None)
            (self.path(job) / RECORD).unlink(missing_ok=True)  # first, so that a restart does not find it
            self.changed.notify_all()
        shutil.rmtree(self.path(job), ignore_errors=True)

    def copy_video(self, source: Job, target: Job) -> bool:
        """Gives a job the video of another; False where that is gone."""
        for name in (SIDECAR, VIDEO):
            making = self.path(target) / f"making_{name}"
            try:
                shutil.copyfile(self.path(source) / name, making)
                making.replace(self.path(target) / name)
            except OSError:
                return False
        return True


def new(name: str, asked: dict[str, Any], same: str, group: str = "") -> Job:
    """A job of now."""
    return Job(name, asked, time.time(), same=same, group=group)


def digest(*parts: str) -> str:
    """Tells requests apart."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
