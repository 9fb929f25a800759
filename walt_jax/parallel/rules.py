"""One ordered table of rules maps the logical axes that modules name to the axes of the mesh."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from walt_jax.errors import UserError

Rule = tuple[str, str | tuple[str, ...] | None]
Rules = tuple[Rule, ...]

DEFAULT_RULES: Rules = (
    # Activations.
    ("batch", ("data", "fsdp")),
    ("tokens", "context"),
    # The denoiser's and the text encoder's parameters: one side of each matrix along `fsdp`, the hidden one along
    # `tensor`.
    ("embed", "fsdp"),
    ("embed_out", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    # The tokenizer's.
    ("channels_in", "fsdp"),
    ("channels_out", "tensor"),
    # Too small or too odd to be divided: classes + 1, codes, pixels of a patch; the discriminator, which begins with 3
    # channels and ends with 1.
    ("layers", None),
    ("vocab", None),
    ("text", None),
    ("head_dim", None),
    ("rank", None),
    ("latent", None),
    ("pixel", None),
    ("channels", None),
    ("position", None),
    ("relative", None),
    ("critic_in", None),
    ("critic_out", None),
)

active_rules = jax.make_user_context(())  # those that precede `DEFAULT_RULES`, a part of each traced program's key


def mesh_axes(names: Sequence[str | None], rules: Rules = ()) -> list[tuple[str, ...]]:
    """For each axis of an array the mesh axes that divide it.

    Of a name's rows the first one holds none of whose mesh axes divides an earlier axis of the array.

    Args:
        names: the array's logical axes; None is never divided.
        rules: rows that precede `DEFAULT_RULES`.

    Raises:
        UserError: if a name has no row.
    """
    used: set[str] = set()
    found = []
    for name in names:
        rows = [_tuple(axes) for logical, axes in (*rules, *DEFAULT_RULES) if logical == name]
        if name is not None and not rows:
            raise UserError(
                f"config.rules has no row for the logical axis {name!r}; add one, such as ({name!r}, None)."
            )
        axes = next((row for row in rows if not used.intersection(row)), ())
        used.update(axes)
        found.append(axes)
    return found


def check_rules(rules: Rules, mesh: Mesh) -> None:
    """Checks the rows of a config.

    Raises:
        UserError: if one names a logical axis that no module has, or an axis that the mesh has not.
    """
    known = {name for name, _ in DEFAULT_RULES}
    for name, axes in rules:
        if name not in known:
            raise UserError(f"config.rules has a row for {name!r}; modules name {', '.join(sorted(known))}.")
        for axis in _tuple(axes):
            if axis not in mesh.shape:
                raise UserError(f"config.rules maps {name!r} to {axis!r}; the mesh has {', '.join(mesh.shape)}.")


def _tuple(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _spec(axes: list[tuple[str, ...]], mesh: Any) -> PartitionSpec:
    """Mesh axes of size 1 are left out."""
    real = [tuple(axis for axis in group if mesh.shape[axis] > 1) for group in axes]
    return _trimmed([(group[0] if len(group) == 1 else group or None) for group in real])


def _trimmed(axes: list[Any]) -> PartitionSpec:
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def shardings(boxed: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """For each parameter how it is divided.

    Args:
        boxed: parameters or their shapes with logical axis names, `nn.Partitioned`; what has no names is on all
            devices.
        mesh: see `mesh.make_mesh`.
        rules: rows that precede `DEFAULT_RULES`.

    Returns:
        A tree of `NamedSharding`s, without boxes.

    Raises:
        UserError: if an axis can't be divided.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = mesh_axes(leaf.names, rules)
        for name, size, group in zip(leaf.names, leaf.value.shape, axes, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in group)
            if size % parts:
                layer = "/".join(str(entry.key) for entry in path if hasattr(entry, "key"))
                product = " × ".join(f"{axis}={mesh.shape[axis]}" for axis in group)
                raise UserError(
                    f"{layer} has {size} along {name!r}, which config.mesh.{product} does not divide; choose a size "
                    f"that does, or leave the axis whole: --config.rules=\"(('{name}', None),)\"."
                )
        return NamedSharding(mesh, _spec(axes, mesh))

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def like_parameters(state: Any, params: Any, divided: Any, mesh: Mesh) -> Any:
    """Shardings of what an optimizer keeps: as those of the parameter that the end of an array's path names.

    An array that lacks one axis of its parameter (Adafactor's means over rows and columns) is divided along the others;
    what belongs to no parameter is on all devices.

    Args:
        state: the optimizer's state, shapes suffice.
        params: the parameters or their shapes, without boxes.
        divided: their shardings.
        mesh: see `mesh.make_mesh`.
    """
    known = {
        _names(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(divided), strict=True
        )
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        shape, spec = next((known[names[i:]] for i in range(len(names)) if names[i:] in known), (None, None))
        if shape is None:
            return NamedSharding(mesh, PartitionSpec())
        full = (*spec, *[None] * (len(shape) - len(spec)))
        if leaf.shape == shape:
            return NamedSharding(mesh, spec)
        # Of equal sides it is not known which one is missing; optax takes the last for rows, the first for columns.
        order = range(len(shape)) if "v_col" in names else reversed(range(len(shape)))
        for axis in order:
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(mesh, _trimmed([*full[:axis], *full[axis + 1 :]]))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says how an activation is divided over the mesh in context; x itself where there is none, or one device.

    An axis of the mesh that does not divide an axis of x is left out: a batch of eight samples runs on any mesh.

    Args:
        x: an array.
        names: its logical axes, from the first on; None and those not named are left to the compiler.

    Raises:
        UserError: if a name has no rule.
    """
    mesh = _mesh_in_context()
    if mesh is None:
        return x
    free = PartitionSpec.UNCONSTRAINED
    axes = _dividing(x.shape, mesh_axes(names, active_rules.value), mesh)
    spec = [free if name is None else group or None for name, group in zip(names, axes, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, *[free] * (x.ndim - len(spec))))


def gathered(parameter: jax.Array, names: Sequence[str | None], dtype: Any) -> jax.Array:
    """A parameter as its layer computes with it, of type `dtype`.

    Along the mesh axes that divide the batch each device gets all of it; left to itself, the compiler may move
    activations instead. The gradient is summed over these devices in the parameter's own type, and each keeps its part.

    Args:
        parameter: divided by its logical axes.
        names: these.
        dtype: of the computation.
    """
    mesh = _mesh_in_context()
    if mesh is None:
        return parameter.astype(dtype)
    axes = _dividing(parameter.shape, mesh_axes(names, active_rules.value), mesh)
    (batch,) = mesh_axes(("batch",), active_rules.value)
    divided = _spec(axes, mesh)
    whole = _spec([tuple(axis for axis in group if axis not in batch) for group in axes], mesh)

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x.astype(dtype), whole)

    def backward(_: None, slope: jax.Array) -> tuple[jax.Array]:
        slope = jax.lax.with_sharding_constraint(slope.astype(parameter.dtype), whole)
        return (jax.lax.with_sharding_constraint(slope, divided),)

    gather.defvjp(lambda x: (gather(x), None), backward)
    return gather(parameter)


def divided_along(name: str, size: int = 0) -> dict[str, int]:
    """The axes of the mesh in context, and their sizes, that divide the logical axis `name`, of `size` (0: of any)."""
    mesh = _mesh_in_context()
    if mesh is None:
        return {}
    (axes,) = _dividing((size,), mesh_axes((name,), active_rules.value), mesh)
    return {axis: mesh.shape[axis] for axis in axes if mesh.shape[axis] > 1}


def _mesh_in_context() -> Any:
    """None where there is none, one device, or `shard_map` has taken all of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if math.prod(mesh.shape[axis] for axis in mesh.auto_axes) == 1 else mesh


def _dividing(shape: Sequence[int], axes: list[tuple[str, ...]], mesh: Any) -> list[tuple[str, ...]]:
    """The mesh axes that divide an array's axes, without those that don't, and without `shard_map`'s."""
    found = []
    for size, group in zip(shape, axes, strict=False):
        kept: tuple[str, ...] = ()
        for axis in group:
            if axis in mesh.auto_axes and size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
                kept += (axis,)
        found.append(kept)
    return found
