"""Config files that change another one."""

import pathlib
import runpy

from ml_collections import ConfigDict


def parent(file: str, name: str) -> ConfigDict:
    """The knobs of the config that another one changes.

    A config has at most one parent, and a parent has none: two files show all of a config. The parent is looked for
    next to the file, so that `--config=PATH` works from any folder.

    Args:
        file: `__file__` of the config that changes it.
        name: of the parent's file in the same folder, without ".py".
    """
    return runpy.run_path(str(pathlib.Path(file).with_name(f"{name}.py")))["get_config"]()
