"""Starting from another run: what fits of its parameters, by path and shape, is taken, and the rest is fresh."""

import dataclasses
import pathlib
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

# Tables whose shape depends on the size of clips and windows, which the stage interpolates, see `denoiser.resize`.
TABLES = ("space_embedding", "time_embedding", "relative_bias")
NAMED = 5  # arrays in a message
LEAST = 0.01  # of the parameters; some bias always has the right shape


@dataclasses.dataclass(frozen=True)
class Taken:
    """What fits of another run's parameters.

    Attributes:
        params: nested as those that a stage serves; arrays that don't fit are left out.
        fraction: of the stage's parameters.
        sentences: on what is taken, what is fresh, and what is not used.
    """

    params: Any
    fraction: float
    sentences: list[str]


def take(found: Any, like: Any, source: pathlib.Path, left_out: dict[str, str] | None = None) -> Taken:
    """Compares what another run serves with what a stage will serve.

    Args:
        found: the other run's arrays, nested.
        like: arrays or shapes of the stage.
        source: the other run's workdir, for the sentences.
        left_out: parts, by the first name of their paths, that are not comparable, and why.
    """
    left_out = left_out or {}
    theirs, ours = flatten_dict(found), flatten_dict(like)
    taken, fresh = {}, []
    for path, target in ours.items():
        array, name = theirs.get(path), "/".join(path)
        if path[0] in left_out:
            fresh.append(f"{name} ({left_out[path[0]]})")
        elif array is None:
            fresh.append(name)
        elif array.shape == target.shape or (path[-1].startswith(TABLES) and array.ndim == len(target.shape)):
            taken[path] = array
        else:
            fresh.append(f"{name} ({_size(target)} here, {_size(array)} there)")
    unused = ["/".join(path) for path in theirs if path not in ours]
    count, total = sum(ours[path].size for path in taken), sum(leaf.size for leaf in ours.values())
    sentences = [f"{source}: {len(taken)} of {len(ours)} arrays, {count:,} of {total:,} parameters fit"]
    resized = ["/".join(path) for path in taken if theirs[path].shape != ours[path].shape]
    for what, names in {"interpolated": resized, "fresh": fresh, "not used": unused}.items():
        if names:
            others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            sentences.append(f"{what}: {', '.join(names[:NAMED])}{others}")
    return Taken(unflatten_dict(taken), count / total, sentences)


def completed(taken: Any, fresh: Any) -> Any:
    """The arrays of `taken`, and those of `fresh` that it lacks; both are nested dictionaries."""
    return unflatten_dict({**flatten_dict(fresh, keep_empty_nodes=True), **flatten_dict(taken)})


def _size(array: Any) -> str:
    return "×".join(map(str, array.shape)) or "one number"
