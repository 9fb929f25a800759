"""Checkpoints with Orbax: written in the background, complete or absent, with the data's position next to the state.

Each has a manifest with digests, see `manifest`, written before the checkpoint is committed. What differs from its
manifest is not read.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from walt_jax.errors import UserError, reason_of
from walt_jax.parallel.processes import exchanged, of_lost_process, one_after_the_first, place
from walt_jax.remote import as_user_error, is_remote, resolved
from walt_jax.training.manifest import MANIFEST, damage, has_manifest, write_manifest
from walt_jax.training.state import TrainState
from walt_jax.training.stopping import WRITING

COMMITTED = "commit_success.txt"  # Orbax's last file of a checkpoint, where folders can't be renamed
NOT_WRITABLE = re.compile("permission|read-only", re.IGNORECASE)  # in errors of Orbax and TensorStore


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which of a stage's checkpoints stay: those that any of these names.

    Attributes:
        last: the newest ones.
        best: those with the greatest scores.
        every_hours: the first, and then each so much newer than the last one of these; 0 keeps none for its age.
    """

    last: int = 2
    best: int = 0
    every_hours: float = 0.0

    def options(self) -> dict[str, Any]:
        """Of Orbax's manager."""
        policies: list[Any] = [preservation.LatestN(self.last)]
        if self.every_hours:
            policies.append(preservation.EveryNSeconds(round(3600 * self.every_hours)))
        if not self.best:
            return {"preservation_policy": preservation.AnyPreservationPolicy(policies)}
        best = preservation.BestN(get_metric_fn=_score, n=self.best, keep_checkpoints_without_metrics=False)
        return {"preservation_policy": preservation.AnyPreservationPolicy([*policies, best]), "best_fn": _score}


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


class Checkpoints:
    """A stage's checkpoints in `directory`.

    Saving is asynchronous. Orbax writes to a temporary folder and renames it once it is complete, so that a process
    killed while saving leaves the checkpoint before. An object store can't rename; there a last file says that a
    checkpoint is complete.

    Args:
        directory: one folder a step, named by its number.
        writer: whether checkpoints are saved here. Only the writer makes the folder and removes what a killed process
            left unfinished; a reader changes nothing, and so can't disturb a run that is saving meanwhile.
        keep: which checkpoints are not removed once others are saved.
        before_commit: called when a checkpoint's arrays are written, before it counts as complete.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        writer: bool,
        keep: Keep = Keep(),
        before_commit: Callable[[], None] = lambda: None,
    ):
        self.directory, self._before_commit = directory, before_commit
        self._damaged: list[int] = []  # steps newer than the one restored, which could not be read
        self._saving = 0  # the step that is being written
        self._manager = None
        if writer or directory.is_dir():
            verbosity = logging.get_verbosity()
            if not writer:  # Orbax warns that a reader can't write
                logging.set_verbosity(logging.ERROR)
            try:
                options = ocp.CheckpointManagerOptions(
                    **keep.options(),
                    create=writer,
                    cleanup_tmp_directories=writer,
                    read_only=not writer,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
                )
                self._manager = ocp.CheckpointManager(resolved(directory), options=options)
            finally:
                logging.set_verbosity(verbosity)
        if writer:
            WRITING.append(self._manager.is_saving_in_progress)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def save(self, state: TrainState, position: dict, outcome: dict, score: float | None = None) -> None:
        """Saves under the state's step. Damaged checkpoints of later steps are renamed first, to `STEP.damaged`.

        Args:
            state: what the stage changes with its steps.
            position: the data iterator's state.
            outcome: what the finished stage has measured, empty before; see `loop.run_stage`.
            score: by which the best are kept, where any are.

        Raises:
            UserError: if this one, or the one before, can't be written.
        """
        if self._damaged:
            with one_after_the_first() as first:
                for step in self._damaged if first else ():
                    set_aside(self.directory / str(step), "damaged")
            self._damaged = []
            self._manager.reload()
        # A copy: the next step donates the state's buffers, and Orbax may still be writing from them.
        state = jax.tree.map(jnp.copy, state)
        items = {name: ocp.args.StandardSave(part) for name, part in _parts(state).items()}
        items |= {"data": ocp.args.JsonSave(position), "outcome": ocp.args.JsonSave(outcome)}
        with self._writing():
            self._manager.wait_until_finished()
            # Orbax's threads may wait minutes for a folder that is not made.
            if not (is_remote(self.directory) or os.access(self.directory, os.W_OK)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.directory))
            self._saving = int(state.step)
            metrics = None if score is None else {"score": score}
            self._manager.save(self._saving, args=ocp.args.Composite(**items), metrics=metrics)

    def _write_manifest(self) -> None:
        """In Orbax's thread, once a checkpoint's items are complete and before it is committed."""
        self._before_commit()
        final = epath.Path(resolved(self.directory)) / str(self._saving)
        # Where folders can't be renamed, the final one is written to, and a file commits it.
        write_manifest(final if final.exists() else next(final.parent.glob(f"{final.name}.orbax-checkpoint-tmp*")))

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            UserError: if it can't be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of Orbax and TensorStore, which come late, become one sentence."""
        try:
            yield
        except Exception as error:  # a full disk is an OSError, a ValueError or a RuntimeError, by who meets it first
            if of_lost_process(error):
                raise
            complete = max(self.steps(), default=None)
            kept = f"the checkpoint of step {complete} is complete" if complete else "there is no checkpoint yet"
            reason = reason_of(error)
            if is_remote(self.directory) and (
                known := as_user_error(error.__cause__ or error, self.directory, f"; {kept}")
            ):
                raise known from error
            remedy = "make it writable" if NOT_WRITABLE.search(reason) else "free some space"
            raise UserError(
                f"A checkpoint can't be written to {self.directory} ({reason}); {kept}: {remedy}, then start the same "
                "command again."
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict, dict]:
        """The newest (state, position, outcome) that can be read; newer ones are named in a warning.

        Args:
            like: a state, or its shapes, types and shardings, that the checkpoint has to fit. The state may have been
                saved from another mesh.

        Raises:
            UserError: if there is none, or none fits.
        """
        items = {name: ocp.args.StandardRestore(on_our_devices(part)) for name, part in _parts(like).items()}
        restored = self._restore(**items, data=ocp.args.JsonRestore(), outcome=ocp.args.JsonRestore())
        state = restored["state"].replace(**restored["weights"], ema=restored.get("ema"))
        return state, restored["data"], restored["outcome"]

    def restore_part(self, name: str, like: Any) -> tuple[Any, dict]:
        """The newest (part of the state, outcome) that can be read.

        Args:
            name: "ema", the average of what the task serves; or "weights", {"params", "moving"}.
            like: the part, or its shapes, types and shardings.

        Raises:
            UserError: as `restore`.
        """
        items = {name: ocp.args.StandardRestore(on_our_devices(like))}
        restored = self._restore(**items, outcome=ocp.args.JsonRestore())
        return restored[name], restored["outcome"]

    def _restore(self, **items: Any) -> Any:
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            folder = epath.Path(resolved(self.directory)) / str(step)
            # Each process reads its part of the files; all pass over the same checkpoints.
            if wrong := next(filter(None, exchanged(damage(folder, items, *place()))), None):
                damaged[step] = wrong
                continue
            if not has_manifest(folder):
                print(
                    f"warning: the checkpoint {self.directory / str(step)} has no {MANIFEST}, as those of older "
                    "versions, so damage in its arrays may go unseen.",
                    file=sys.stderr,
                )
            reason = None
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # whatever a damaged file makes Orbax and TensorStore stumble over
                reason = reason_of(error)
            if reason := next(filter(None, exchanged(reason)), None):
                damaged[step] = reason
                continue
            for other, reason in damaged.items():
                print(
                    f"warning: the checkpoint {self.directory / str(other)} is damaged ({reason}); the one of step "
                    f"{step} is taken.",
                    file=sys.stderr,
                )
            self._damaged = list(damaged)
            return restored
        if not damaged:
            raise UserError(f"{self.directory} holds no checkpoint; train first, with --mode=train.")
        newest = max(damaged)
        others = f", and {len(damaged) - 1} before it" if len(damaged) > 1 else ""
        raise UserError(
            f"The checkpoint {self.directory / str(newest)} is damaged or of another config ({damaged[newest]})"
            f"{others}; restore it from a copy, or rename {self.directory} to train this stage anew."
        )

    def close(self) -> None:
        """Waits as `wait`, and frees what Orbax holds."""
        if self._manager is None:
            return
        self.wait()
        self._manager.close()
        if self._manager.is_saving_in_progress in WRITING:  # not where a signal has ended the wait
            WRITING.remove(self._manager.is_saving_in_progress)


def saved_steps(workdir: pathlib.Path, stage: str) -> list[int]:
    """The steps of a run's stage that have a checkpoint, in ascending order, without opening Orbax's manager."""
    folder = workdir / "checkpoints" / stage
    named = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(int(path.name) for path in named if not is_remote(path) or (path / COMMITTED).exists())


def _parts(state: TrainState) -> dict[str, Any]:
    """The state in parts, so that sampling reads only the average, or only the weights if there is no average."""
    parts = {
        "weights": {"params": state.params, "moving": state.moving},
        "state": state.replace(params=None, moving=None, ema=None),
    }
    return parts if state.ema is None else {"ema": state.ema, **parts}


def set_aside(path: pathlib.Path, why: str) -> pathlib.Path | None:
    """Renames a file or folder to a name of its own, PATH.WHY or PATH.WHY-2 and so on; None where it isn't there."""
    if not path.exists():
        return None
    names = (path.with_name(f"{path.name}.{why}{f'-{number}' if number > 1 else ''}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    return path.rename(free)


def on_our_devices(like: Any) -> Any:
    """The shapes and types of `like`, to be restored with its shardings, on the first device where it has none.

    A checkpoint remembers the devices that it came from, which may be others.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    return jax.tree.map(shape, like)
