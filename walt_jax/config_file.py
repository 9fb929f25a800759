"""Config files: found by their names, and those that change another one."""

import pathlib
import re
import runpy

from ml_collections import ConfigDict

from walt_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).parent


def parent(file: str, name: str) -> ConfigDict:
    """The knobs of the config that another one changes.

    A config has at most one parent, and a parent has none: two files show all of a config. The parent is looked for
    next to the file, so that `--config=PATH` works from any folder.

    Args:
        file: `__file__` of the config that changes it.
        name: of the parent's file in the same folder, without ".py".
    """
    return runpy.run_path(str(pathlib.Path(file).with_name(f"{name}.py")))["get_config"]()


def with_config_path(argument: str) -> str:
    """`--config=walt_l` or `--config=tokenizer_clips:fsq` with the path of that config; other arguments as they are.

    Raises:
        UserError: if there is no config of that name.
    """
    found = re.fullmatch(r"(--?config=)(\w+)(:.*)?", argument)
    if found is None or pathlib.Path(found[2]).is_file():
        return argument
    # In a wheel configs are part of the package; in a clone they are next to it.
    folders = [folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()]
    for folder in folders:
        if (folder / f"{found[2]}.py").exists():
            return f"{found[1]}{folder / found[2]}.py{found[3] or ''}"
    names = sorted(path.stem for folder in folders for path in folder.glob("*.py"))
    raise UserError(f"{argument} is no config of walt_jax ({', '.join(names)}); name one, or the path of a file.")
