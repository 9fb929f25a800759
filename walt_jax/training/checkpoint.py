"""Checkpoints with Orbax: written in the background, complete or absent, with the data's position beside the state."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from walt_jax.errors import UserError
from walt_jax.training.state import TrainState


class Checkpoints:
    """A stage's checkpoints in `directory`, the newest two kept.

    Saving is asynchronous. Orbax writes to a temporary folder and renames it when all is there, so that a process that
    is killed meanwhile leaves the checkpoint before.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        # What a killed process left half written goes.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict, outcome: dict) -> None:
        """Saves under the state's step.

        Args:
            state: what the stage changes with its steps.
            position: the data iterator's state.
            outcome: what the finished stage has measured, empty before; see `loop.run_stage`.
        """
        # A copy: the next step donates the state's buffers, and Orbax may still be writing from them.
        state = jax.tree.map(jnp.copy, state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                # Apart from the rest, so that sampling reads a quarter of the bytes.
                ema=ocp.args.StandardSave(state.ema),
                state=ocp.args.StandardSave(state.replace(ema=None)),
                data=ocp.args.JsonSave(position),
                outcome=ocp.args.JsonSave(outcome),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict, dict]:
        """The newest (state, position, outcome).

        Args:
            like: a state, or its shapes and types, that the checkpoint has to fit.

        Raises:
            UserError: if there is none, it does not fit or is damaged.
        """
        restored = self._restore(
            ema=ocp.args.StandardRestore(on_this_device(like.ema)),
            state=ocp.args.StandardRestore(on_this_device(like.replace(ema=None))),
            data=ocp.args.JsonRestore(),
            outcome=ocp.args.JsonRestore(),
        )
        return restored["state"].replace(ema=restored["ema"]), restored["data"], restored["outcome"]

    def restore_ema(self, like: Any) -> tuple[Any, dict]:
        """The newest (average of what the task serves, outcome).

        Raises:
            UserError: as `restore`.
        """
        restored = self._restore(ema=ocp.args.StandardRestore(on_this_device(like)), outcome=ocp.args.JsonRestore())
        return restored["ema"], restored["outcome"]

    def _restore(self, **items: Any) -> Any:
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint; train first, with --mode=train.")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever a damaged file makes Orbax and TensorStore stumble over
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            before = [other for other in self._manager.all_steps() if other < step]
            remedy = f"remove it to go on from step {max(before)}" if before else "start in another --workdir"
            raise UserError(
                f"The checkpoint {self.directory / str(step)} is damaged or of another config ({reason}); {remedy}."
            ) from error

    def close(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def on_this_device(like: Any) -> Any:
    """The shapes and types of `like`, to be restored here: a checkpoint remembers the devices that it came from."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
