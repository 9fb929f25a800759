"""Checkpoints with Orbax: written in the background, complete or absent, with the data's position beside the state."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from walt_jax.errors import UserError


class Checkpoints:
    """A stage's checkpoints in `directory`, the newest two kept.

    Saving is asynchronous; Orbax writes to a temporary folder and renames it when all is there, so that a process that
    is killed meanwhile leaves the checkpoint before.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: Any, position: dict) -> None:
        """Saves `state` (a `TrainState`) under its step, and `position`, the data iterator's state."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)),
        )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """The newest state and data position, or None where there is no checkpoint.

        Args:
            like: a state of the same structure, shapes and types.

        Raises:
            UserError: if the checkpoint holds something else.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"The checkpoint {self.directory / str(step)} does not fit this config or is damaged ({reason}); "
                "use the config it was trained with, or remove it to go on from the one before."
            ) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
