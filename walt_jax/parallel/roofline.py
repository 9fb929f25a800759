"""How fast a compiled program can be: each operation takes what the slowest of FLOPs, HBM, ICI and DCN needs."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from walt_jax.parallel.hardware import Hardware, slice_of
from walt_jax.parallel.hlo import Operation, Product

BOUNDS = ("FLOPs", "HBM", "ICI", "DCN")
# Parts of name stacks that are transformations and control flow, not modules.
NO_MODULE = re.compile(r"^(jit|pjit|jvp|transpose|vmap|while|body|cond|closed_call|checkpoint|rematted_computation|"
                       r"remat|branch_\d+_fun|shard_map|custom_\w+|jit\(.*|)$")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Links:
    """What a group of devices shares data over.

    Attributes:
        hardware: of each device.
        coordinates: of each device of the mesh, in its order: place in the torus, or in the host.
        slices: the slice, or the host, that each is in.
        shape: of a slice's torus; empty where a switch connects its devices.
    """

    hardware: Hardware
    coordinates: np.ndarray
    slices: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, devices: Sequence[Any], hardware: Hardware, shape: tuple[int, ...]) -> "Links":
        """Of TPU devices, which need not be attached."""
        slices = np.array([slice_of(device) for device in devices])
        return cls(hardware, np.array([device.coords for device in devices]), slices, shape)

    def seconds(self, kind: str, size: float, group: np.ndarray | None) -> dict[str, float]:
        """Time of a collective over a group: {"ICI": …, "DCN": …}; either may be 0.

        Rings along each axis of the torus that the group spans, all at once; what crosses slices has been reduced
        within each slice before.

        Args:
            kind: one of `hlo.KINDS`.
            size: bytes of the whole array; of an all-reduce or a reduce-scatter those on each device.
            group: numbers of devices; None is all of them.
        """
        group = np.arange(len(self.slices)) if group is None else np.asarray(group)
        slices = len(set(self.slices[group]))
        inside = len(group) // slices
        seconds = {"ICI": 0.0, "DCN": 0.0}
        rounds = 2 if kind == "all-reduce" else 1
        if inside > 1:
            rate, places = self.hardware.link_bytes_per_second, self.coordinates[group]
            if self.shape:
                spans = [(axis, len(set(places[:, axis]))) for axis in range(places.shape[1])]
                # A ring closes where the group has the whole of an axis that wraps.
                rings = [
                    2 if size == self.shape[axis] and size % self.hardware.wrap == 0 else 1
                    for axis, size in spans
                    if size > 1
                ]
                rate *= max(1, sum(rings)) if kind != "collective-permute" else 1
            moved = size * rounds * (inside - 1) / inside
            if kind == "all-to-all":
                moved = size * (inside / 4 if self.shape else (inside - 1) / inside)
            elif kind == "collective-permute":
                moved = size
            seconds["ICI"] = moved / rate
        if slices > 1:
            seconds["DCN"] = size / inside * rounds * (slices - 1) / slices / self.hardware.dcn_bytes_per_second
        return seconds


def unit_seconds(product: Product, hardware: Hardware) -> float:
    """Time of a matrix product at the stated peak, with what its sides are padded to on the matrix unit.

    Columns and depth are padded, or rows and depth: the smaller of the two can be what stays in the unit.
    """

    def padding(side: int) -> float:
        return math.ceil(side / hardware.matrix_unit) * hardware.matrix_unit / side if side else 1.0

    rows, columns, depth = product.sides
    return product.flops * padding(depth) * min(padding(rows), padding(columns)) / hardware.peak_flops


@dataclasses.dataclass
class Estimate:
    """How long a program takes on devices of a kind.

    Attributes:
        seconds: of all of it; what overlaps counts once.
        bound: seconds bound by each of `BOUNDS`; they sum to `seconds`.
        parts: {part: {bound: seconds}}: by module, collectives that the program waits for by kind.
        flops: matrix products and convolutions of one device, without padding.
        hbm_bytes: read and written by one device.
        collective_bytes: {kind: bytes}: sizes of the arrays of one device's collectives.
        dcn_bytes: those of them that cross slices.
        compiler_seconds: the same with the compiler's cycle estimate of each operation where that is longer; 0 where
            it gives none.
    """

    seconds: float
    bound: dict[str, float]
    parts: dict[str, dict[str, float]]
    flops: int
    hbm_bytes: int
    collective_bytes: dict[str, int]
    dcn_bytes: int
    compiler_seconds: float

    @property
    def bound_by(self) -> str:
        """What most of the time is bound by."""
        return max(self.bound, key=self.bound.__getitem__)


def estimate(operations: Sequence[Operation], links: Links, part_of: Callable[[str], str] | None = None) -> Estimate:
    """Sums a program's operations up.

    Collectives that overlap take only what the other operations of their loop body don't cover; others are waited for.
    """
    hardware, part_of = links.hardware, part_of or module_part
    parts: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys(BOUNDS, 0.0))
    work: dict[str, float] = collections.Counter()  # by loop body
    hidden: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys(BOUNDS, 0.0))
    collective_bytes: dict[str, int] = collections.Counter()
    flops = hbm_bytes = dcn_bytes = 0
    slower = 0.0
    for each in operations:
        flops += each.flops
        hbm_bytes += each.times * each.hbm_bytes
        if each.kind:
            taken = links.seconds(each.kind, each.bytes, None if each.groups is None else each.groups[0])
            collective_bytes[each.kind] += each.times * each.bytes
            dcn_bytes += each.times * each.bytes * (taken["DCN"] > 0)
            for bound, seconds in taken.items():
                target = hidden[each.computation] if each.overlaps else parts[each.kind]
                target[bound] += each.times * seconds
        units = sum(unit_seconds(product, hardware) for product in each.products)
        memory = each.hbm_bytes / hardware.hbm_bytes_per_second
        if each.overlaps and not each.kind:
            hidden[each.computation]["HBM"] += each.times * memory
            continue
        seconds = max(units, memory)
        work[each.computation] += each.times * seconds
        parts[part_of(each.op_name)]["FLOPs" if units >= memory else "HBM"] += each.times * seconds
        if hardware.clock_hz:
            slower += each.times * max(0.0, each.cycles / hardware.clock_hz - seconds)
    for computation, waits in hidden.items():
        for bound, name in (("HBM", "copies"), ("ICI", "collectives"), ("DCN", "collectives")):
            parts[name][bound] += max(0.0, waits[bound] - work[computation])
    parts = {name: bounds for name, bounds in parts.items() if any(bounds.values())}
    bound = {name: sum(part[name] for part in parts.values()) for name in BOUNDS}
    seconds = sum(bound.values())
    return Estimate(
        seconds,
        bound,
        dict(sorted(parts.items(), key=lambda part: -sum(part[1].values()))),
        flops,
        hbm_bytes,
        dict(collective_bytes),
        dcn_bytes,
        seconds + slower if slower else 0.0,
    )


def module_part(op_name: str) -> str:
    """A part of a step by JAX's name stack: the module, at most two deep, and whether it is the backward pass."""
    names = re.sub(r"\b(jvp|transpose|vmap|checkpoint)\(([^()]*)\)", r"\2", op_name)
    names = re.sub(r"\b(jvp|transpose|vmap|checkpoint)\(([^()]*)\)", r"\2", names)
    modules = [name for name in names.split("/")[:-1] if not NO_MODULE.match(name) and "->" not in name]
    modules = [re.sub(r"\d+$", "", name) for name in modules if not name.startswith(("jit(", "jvp(", "transpose("))]
    if not modules or modules[0] == "optimizer":
        return "optimizer" if modules else "loss, norms, average"
    way = "backward" if "transpose(" in op_name else "forward"
    if "rematted_computation" in op_name:
        way = "recomputed"
    return f"{'/'.join(dict.fromkeys(modules[-2:]))} {way}"
