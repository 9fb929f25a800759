"""Writes `shardings/NAME.json`: how the last stage's state of a config is divided over a mesh of real size.

    python tests/golden/make_shardings.py

Each line is an array of the state: its shape, for each axis the mesh axes that divide it, and its shape on a device.
"""

import importlib
import json
import pathlib
import sys

import jax
from jax.sharding import AbstractMesh, AxisType

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from walt_jax.config import build, plain
from walt_jax.parallel.mesh import AXES
from walt_jax.training.optimizer import make_optimizer
from walt_jax.training.run_config import RunConfig, make_task
from walt_jax.training.state import abstract_state

FOLDER = pathlib.Path(__file__).parent / "shardings"
# name of the file: (config, sizes of the mesh, what they are of)
TABLES = {
    "walt_l_v5e_4x4": ("walt_l", {"fsdp": 16}),
    "walt_3b_v5p_4x4x8": ("walt_3b", {"data": 8, "fsdp": 16}),
    "walt_xl_h100_8": ("walt_xl", {"data": 2, "fsdp": 2, "tensor": 2}),
    "magvit2_video_h100_8": ("magvit2_video", {"fsdp": 8}),
}


def table(name: str) -> str:
    """The content of a file."""
    config_name, sizes = TABLES[name]
    config = build(RunConfig, plain(importlib.import_module(f"configs.{config_name}").get_config(), "config"), "config")
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    stage = config.trained_stages[-1]
    task, settings = make_task(config, stage, config.most_pieces), config.stages[stage]
    optimizer = make_optimizer(settings.optimizer, settings.steps, jax.eval_shape(task.init, jax.random.key(0))[0])
    state = abstract_state(task, optimizer, mesh, (), settings.ema_decay)
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        row = [list(leaf.shape), list(leaf.sharding.spec), list(leaf.sharding.shard_shape(leaf.shape))]
        lines.append(f"{json.dumps(jax.tree_util.keystr(path, simple=True, separator='/'))}: {json.dumps(row)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in TABLES:
        (FOLDER / f"{name}.json").write_text(table(name))
