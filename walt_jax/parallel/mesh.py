"""The mesh: all devices along four named axes, and where a batch goes on it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from walt_jax.config import Range
from walt_jax.errors import UserError
from walt_jax.parallel.hardware import slice_of
from walt_jax.parallel.rules import Rules, active_rules

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")

Size = Annotated[int, Range(-1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1, at most once, is what the others leave.

    Attributes:
        data: copies of the model, each with its part of the batch.
        fsdp: the batch is divided along it too, and so are parameters, gradients and optimizer state; each layer's
            parameters are gathered when it runs.
        tensor: heads and hidden features of each layer are divided along it.
        context: tokens of each clip are divided along it.
        slices: groups of devices with fast links within and slow ones between them: TPU slices, hosts of GPUs. Only
            `data` spans them. -1 is as many as the devices say.
    """

    data: Size = -1
    fsdp: Size = 1
    tensor: Size = 1
    context: Size = 1
    slices: Size = -1

    def __post_init__(self):
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"{' and '.join(a for a in AXES if sizes[a] == -1)} are -1; only one axis can be the rest")
        for name in (*AXES, "slices"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; an axis has at least 1 device, or -1 for what the others leave")


def make_mesh(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh of the devices, with the axes `AXES` of type Auto.

    Without an axis of -1 the first devices are taken, as many as the sizes need. Of several slices each has an equal
    part of `data`, so that gradients of parameters are summed within a slice before they cross the slow links.

    Raises:
        UserError: if the sizes and the number of devices or slices don't fit.
    """
    slices = _slices(config, devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "the axes"
    if fixed > len(devices) or (-1 in sizes.values() and len(devices) % fixed):
        raise UserError(
            f"config.mesh needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices ({named}), and there "
            f"are {len(devices)}; choose sizes whose product divides {len(devices)}."
        )
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    taken = list(devices)[: math.prod(sizes.values())]
    if slices > 1 and (len(taken) < len(devices) or sizes["data"] % slices):
        raise UserError(
            f"config.mesh.data is {sizes['data']}, and there are {slices} slices of {len(devices) // slices} devices, "
            f"of which it takes equal parts; set fsdp × tensor × context to a divisor of {len(devices) // slices} and "
            "data to -1."
        )
    if slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), taken, allow_split_physical_axes=True)
    else:
        within = {**sizes, "data": sizes["data"] // slices}
        array = mesh_utils.create_hybrid_device_mesh(
            tuple(within.values()), (slices, 1, 1, 1), taken, allow_split_physical_axes=True
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(config: MeshConfig, devices: Sequence[Any]) -> int:
    """The number of slices that the devices are in.

    Raises:
        UserError: if the config names another.
    """
    found = len(set(map(slice_of, devices)))
    if config.slices not in (-1, found):
        raise UserError(f"config.mesh.slices is {config.slices}, and the devices are in {found}; set it to {found}.")
    return found


def data_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_shards(mesh: Mesh) -> tuple[int, ...]:
    """Ascending indices of the parts of a batch that this process's devices compute; parts as in `data_shards`."""
    by_shard = mesh.devices.reshape(data_shards(mesh), -1)
    here = jax.process_index()
    return tuple(shard for shard, devices in enumerate(by_shard) if any(d.process_index == here for d in devices))


def described(sizes: Mapping[str, int]) -> str:
    """A mesh's axes and sizes, such as "data 2 × fsdp 4"; "1 device" where that is all."""
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


@contextlib.contextmanager
def on(mesh: Mesh, rules: Rules = ()) -> Iterator[None]:
    """Programs that are traced within have their activations constrained to this mesh by these rules.

    On a mesh of one device nothing is constrained. It is in context all the same: types of arrays name the mesh, and a
    program is compiled twice if its state comes from one that has made it of constants.
    """
    with jax.set_mesh(mesh), active_rules(rules):
        yield


@contextlib.contextmanager
def on_own_devices() -> Iterator[Mesh]:
    """Programs and arrays that are made within are this process's alone, whatever mesh of all processes a run is on."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    with jax.set_mesh(mesh), active_rules(()):
        yield mesh


def spread_over_own_devices(program: Callable[[Any, Any], Any]) -> Callable[[Any, np.ndarray], Any]:
    """Divides the rows of a program's second argument over this process's devices.

    The devices don't wait for each other, so a thread can call it while a program of all processes runs. Each row's
    result is that of one device with as many rows, however many devices there are.

    Args:
        program: jitted, (what all rows share, rows) to an array with as many rows.

    Returns:
        The same, for any number of rows.
    """
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    if mesh.size == 1:
        return program
    rows = PartitionSpec("data")
    mapped = jax.jit(
        jax.shard_map(program, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    )

    def divided(shared: Any, values: np.ndarray) -> Any:
        count = len(values)
        values = np.concatenate([values, np.repeat(values[-1:], -count % mesh.size, 0)])
        with on_own_devices():
            return mapped(shared, values)[:count]

    return divided


def replicated(mesh: Mesh) -> NamedSharding:
    """Each device has all of an array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """For each array of a batch how it is divided: its first axis over `data` and `fsdp`.

    Args:
        batch: clips, latents or tokens with their captions, as the tasks read them; arrays or their shapes.
        mesh: see `make_mesh`.

    Raises:
        UserError: if the batch can't be divided.
    """
    divided = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def sharding(leaf: Any) -> NamedSharding:
        check_rows("A batch", np.shape(leaf)[0], mesh)
        return divided

    return jax.tree.map(sharding, batch)


def check_rows(what: str, size: int, mesh: Mesh) -> None:
    """Checks that the mesh divides a batch of `size` rows, which the message calls `what`.

    Raises:
        UserError: if it does not.
    """
    if size % data_shards(mesh) == 0:
        return
    smaller, rest = divmod(math.gcd(size, data_shards(mesh)), mesh.shape["fsdp"])
    remedy = "make the axes smaller" if rest else f"set --config.mesh.data={smaller}"
    raise UserError(
        f"{what} has {size} rows, which config.mesh.data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']} does not "
        f"divide; make its batch_size a multiple of {data_shards(mesh)}, or {remedy}."
    )


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch onto the mesh; each process has its own rows of it.

    Args:
        batch: NumPy arrays, of the rows of `local_shards`.
        mesh: see `make_mesh`.

    Raises:
        UserError: as `batch_shardings`.
    """
    mine, count = len(local_shards(mesh)), data_shards(mesh)

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((np.shape(leaf)[0] * count // mine, *np.shape(leaf)[1:]), leaf.dtype)

    shapes = jax.tree.map(whole, batch)
    return jax.tree.map(
        lambda sharding, leaf, shape: jax.make_array_from_process_local_data(sharding, leaf, shape.shape),
        batch_shardings(shapes, mesh),
        batch,
        shapes,
    )
