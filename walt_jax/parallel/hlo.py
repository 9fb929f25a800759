"""A compiled program, read from its text: operations, bytes of memory and collectives, with loops' trip counts."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing, or that end what is counted where it starts.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "copy-done", "slice-done", "async-done", "async-update", "call-done", "opt-barrier", "iota",
    *(f"{kind}-done" for kind in KINDS),
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
THROUGH = {"bitcast", "reshape", "convert", "copy", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type. `space` is 0 in the device's memory (HBM); others are on the chip or the host."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Bytes with the padding of the layout's tiles."""
        dims = list(self.dims)
        for axis, size in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        bits = BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or [0])[0])
        return math.prod(dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"\b{name}=([^\s,]+)", self.rest)
        return match and match[1]

    @property
    def calls(self) -> str | None:
        return (self.attribute("calls") or self.attribute("to_apply") or "").lstrip("%") or None

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate; 0 where it gives none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else 0


Computation = dict[str, Instruction]


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?", text):
        order, _, more = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", more)
        space = re.search(r"S\((\d+)\)", more)
        found.append(
            Array(
                dtype,
                tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
                tuple(int(axis) for axis in order.split(",") if axis),
                tuple(int(size) for size in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the entry's name) of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        body = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
        if not body or current is None:
            continue
        rest = line[body.end() :]
        end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
        opens = rest.index("(", end)
        closes = _closing(rest, opens)
        operands = re.findall(r"%([\w.\-]+)", rest[opens:closes]) or re.findall(r"\d+", rest[opens:closes])
        current[body[2]] = Instruction(
            body[2], _arrays(rest[:end]), rest[end:opens].strip(), tuple(operands), rest[closes + 1 :], bool(body[1])
        )
    return computations, entry


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution: multiplications with their additions count as two.

    `sides` are those of the largest plain product in it: rows, columns and what is summed over.
    """

    flops: int
    sides: tuple[int, int, int]


def _valid(out: int, kernel: int, size: int, stride: int, low: int, dilate: int, rhs_dilate: int) -> int:
    """Pairs of a kernel's and an output's place along an axis that meet a value: neither padding nor dilation."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * rhs_dilate - low
    return int(((place >= 0) & (place % dilate == 0) & (place < (size - 1) * dilate + 1)).sum())


def product(instruction: Instruction, computation: Computation) -> Product | None:
    """What a `dot`, a `convolution` or a kernel computes; None of anything else.

    A kernel's is its author's estimate, and its sides are taken to need no padding.
    """
    if instruction.opcode == "custom-call":
        estimated = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', instruction.rest)
        return Product(int(estimated[1]), (0, 0, 0)) if estimated else None
    if instruction.opcode not in ("dot", "convolution"):
        return None
    left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    if instruction.opcode == "dot":

        def size(kind: str) -> int:
            found = re.search(rf"lhs_{kind}_dims=\{{([\d,]*)\}}", instruction.rest)
            return math.prod(left[int(axis)] for axis in found[1].split(",") if axis) if found else 1

        depth, rows = size("contracting"), size("batch")
        flops = 2 * math.prod(out) * depth
        height = math.prod(left) // depth // rows
        return Product(flops, (height, math.prod(out) // rows // height, depth))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or "  ")[0]))

    def sizes(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(labels[1])

    places = 1
    for axis in range(len(labels[1]) - 2):
        label = str(axis)
        places *= _valid(
            out[labels[3].index(label)],
            right[labels[2].index(label)],
            left[labels[1].index(label)],
            int(sizes("stride", "1")[axis]),
            int(sizes("pad", "0_0")[axis].split("_")[0]),
            int(sizes("lhs_dilate", "1")[axis]),
            int(sizes("rhs_dilate", "1")[axis]),
        )
    batch = left[labels[1].index("b")] // int(instruction.attribute("batch_group_count") or 1)
    depth, columns = right[labels[2].index("i")], right[labels[2].index("o")]
    flops = 2 * batch * depth * columns * places
    return Product(flops, (flops // 2 // depth // columns, columns, depth))


@dataclasses.dataclass
class Operation:
    """One instruction of the program that runs, or a collective.

    Attributes:
        op_name: JAX's name stack.
        times: how often it runs.
        products: the matrix products in it.
        hbm_bytes: what it reads and writes of the device's memory, once.
        cycles: the compiler's estimate.
        computation: the loop body or program that it is in.
        kind: of a collective, one of `KINDS`.
        bytes: of a collective: of the whole array, that is gathered, reduced or exchanged in a group.
        groups: of a collective: the numbers of the devices that take part together.
        overlaps: of a collective or a copy: whether the program goes on while it runs.
    """

    op_name: str
    times: int
    products: list[Product]
    hbm_bytes: int
    cycles: int
    computation: str
    kind: str = ""
    bytes: int = 0
    groups: np.ndarray | None = None
    overlaps: bool = False

    @property
    def flops(self) -> int:
        """Of all times together."""
        return self.times * sum(product.flops for product in self.products)


class Program:
    """A compiled program's operations.

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self._counted: set[str] = set()

    def operations(self) -> list[Operation]:
        """Everything that runs, in the program's order; of a conditional's branches the one with most operations."""
        self._counted = set()
        return list(self._walk(self.entry, 1))

    def _walk(self, name: str, times: int) -> Iterator[Operation]:
        computation = self.computations[name]
        for instruction in computation.values():
            code = instruction.opcode
            if code in FREE:
                continue
            if code == "while":
                body, condition = (instruction.attribute(part).lstrip("%") for part in ("body", "condition"))
                yield from self._walk(body, times * self._trips(instruction, condition, computation))
            elif code == "conditional":
                branches = re.findall(
                    r"%([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", instruction.rest) or " ")[0]
                )
                branches += [
                    c.lstrip("%") for part in ("true", "false") if (c := instruction.attribute(f"{part}_computation"))
                ]
                yield from max((list(self._walk(branch, times)) for branch in branches), key=_work)
            elif code in ("call", "async-start") and instruction.calls in self.computations:
                yield from self._walk(instruction.calls, times)
            elif code == "call-start" and instruction.calls in self.computations:
                # What a TPU's SparseCore does while the program goes on.
                for each in self._walk(instruction.calls, times):
                    yield dataclasses.replace(each, overlaps=True, computation=name)
            else:
                yield self._operation(instruction, name, times)

    def _trips(self, loop: Instruction, condition: str, around: Computation) -> int:
        """How often a loop runs: as the compiler notes it, or read from its condition `counter < constant`."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        inside = self.computations[condition]
        compared = next((i for i in inside.values() if i.root), None)
        if compared is not None and compared.opcode == "fusion":
            inside = self.computations[compared.calls] | inside
            compared = next((i for i in self.computations[compared.calls].values() if i.root), None)
        limits = [
            int(i.operands[0])
            for i in inside.values()
            if i.opcode == "constant" and i.operands and not i.arrays[0].dims
        ]
        if compared is None or compared.opcode != "compare" or len(limits) != 1:
            return 1
        return limits[0] + ("direction=LE" in compared.rest)

    def _operation(self, instruction: Instruction, name: str, times: int) -> Operation:
        computation = self.computations[name]
        inner = list(self._inner(instruction, computation))
        products = [found for i, around in inner if (found := product(i, around))]
        made = Operation(instruction.op_name, times, products, 0, instruction.cycles, name)
        for each, around in inner:
            kind = next((kind for kind in KINDS if each.opcode in (kind, f"{kind}-start")), None)
            if kind is None:
                continue
            channel = each.attribute("channel_id") or each.name
            if channel in self._counted:
                # Further parts of one that runs while other operations do.
                return dataclasses.replace(made, hbm_bytes=0 if not products else self._bytes(instruction, computation))
            self._counted.add(channel)
            scatters = kind == "all-reduce" and "scatter" in (instruction.calls or "")
            read = sum(around[operand].arrays[0].bytes for operand in each.operands if operand in around)
            written = (
                max((a.bytes for a in each.arrays), default=0)
                if each.opcode.endswith("start")
                else sum(a.bytes for a in each.arrays)
            )
            made.kind = "reduce-scatter" if scatters else kind
            made.bytes = written if kind == "all-gather" else read
            made.groups = groups(each.rest)
            made.overlaps = each.opcode.endswith("start") or any("AsyncCollective" in i.rest for i, _ in inner)
            made.op_name = made.op_name or each.op_name
            return made
        made.overlaps = instruction.opcode in ("copy-start", "slice-start")
        made.hbm_bytes = self._bytes(instruction, computation)
        return made

    def _inner(self, instruction: Instruction, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
        """An instruction, or those of a fusion, with the computation that each is in."""
        if instruction.opcode == "fusion" and instruction.calls in self.computations:
            inside = self.computations[instruction.calls]
            for each in inside.values():
                yield from self._inner(each, inside)
        else:
            yield instruction, computation

    def _bytes(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes of HBM that are read and written. Of what is sliced or updated in place only that part moves."""
        if instruction.opcode in ("copy-start", "slice-start"):
            moved = min((a for a in instruction.arrays if a.dims), key=lambda a: a.bytes, default=None)
            return 0 if moved is None else moved.bytes
        operands = [computation[name] for name in instruction.operands if name in computation]
        if instruction.opcode in SLICES:
            return 2 * sum(a.bytes for a in instruction.arrays if a.space == 0)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].arrays[0].bytes
        if instruction.opcode != "fusion" or instruction.calls not in self.computations:
            arrays = [a for operand in operands if len(operand.arrays) == 1 for a in operand.arrays]
            return sum(a.bytes for a in (*arrays, *instruction.arrays) if a.space == 0)
        inside = self.computations[instruction.calls]
        read = sum(
            min(self._read(inside, number), operand.arrays[0].bytes)
            for number, operand in enumerate(operands)
            if len(operand.arrays) == 1 and operand.arrays[0].space == 0
        )
        root = next(i for i in inside.values() if i.root)
        roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read + sum(
            _written(out, inside) for out, array in zip(roots, instruction.arrays, strict=False) if array.space == 0
        )

    def _read(self, inside: Computation, number: int) -> int:
        """Bytes that a fusion reads of its parameter of this number."""
        names = {i.name for i in inside.values() if i.opcode == "parameter" and i.operands == (str(number),)}
        total = 0
        for each in inside.values():
            used = [place for place, operand in enumerate(each.operands) if operand in names]
            if not used or each.opcode == "parameter":
                continue
            if each.opcode in SLICES:
                total += each.arrays[0].bytes
            elif each.opcode == "dynamic-update-slice" and used == [0]:
                continue
            elif each.opcode == "bitcast":
                names.add(each.name)
            elif each.opcode == "fusion" and each.calls in self.computations:
                total += sum(self._read(self.computations[each.calls], place) for place in used)
            elif each.opcode != "tuple":
                total += sum(inside[each.operands[place]].arrays[0].bytes for place in used[:1])
        return total


def _written(out: Instruction, inside: Computation) -> int:
    """Bytes of HBM that a fusion's result takes to write."""
    while out.opcode in THROUGH and out.operands and out.operands[0] in inside:
        source = inside[out.operands[0]]
        if source.opcode not in (*THROUGH, "dynamic-update-slice", "parameter"):
            break
        out = source
    if out.opcode == "dynamic-update-slice":
        return inside[out.operands[1]].arrays[0].bytes
    return 0 if out.opcode == "parameter" else sum(a.bytes for a in out.arrays)


def _work(operations: list[Operation]) -> int:
    return sum(operation.flops for operation in operations)


def groups(text: str) -> np.ndarray | None:
    """Numbers of the devices that take part in a collective together, `[groups, devices]`; None where all do."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text)
    if listed:
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else np.array(max(rows, key=len))[None]
    dealt = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if dealt:
        shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in dealt.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return numbers.transpose(order or range(len(dims))).reshape(shape)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?\[?([\d,<=\[\]]*)\]?\)?)? \{([^}]*)\}", text)
    if not named:
        return None
    axes = re.findall(r"'([^']+)'=(\d+)", named[1])
    # An axis may be divided: 'a':(2)4 is the 4 after the first 2 of a.
    taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
    dims, chosen = [], []
    for axis, size in axes:
        rest, before = int(size), 1
        for _, first, part in sorted((t for t in taken if t[0] == axis), key=lambda t: int(t[1] or 1)):
            skipped = int(first or 1) // before
            width = int(part or size)
            if skipped > 1:
                dims.append(skipped)
            chosen.append(len(dims))
            dims.append(width)
            before, rest = before * skipped * width, rest // (skipped * width)
        if rest > 1:
            dims.append(rest)
    numbers = np.arange(math.prod(dims)).reshape(dims)
    others = [axis for axis in range(len(dims)) if axis not in chosen]
    return numbers.transpose([*others, *chosen]).reshape(-1, math.prod(dims[axis] for axis in chosen))
