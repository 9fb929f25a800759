"""A config's programs on named hardware: whether they fit, how fast they can be, and what bounds them."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from walt_jax.parallel import analysis, hlo
from walt_jax.parallel.cost import jaxpr_flops
from walt_jax.parallel.mesh import AXES, BATCH_AXES, data_shards, described, make_mesh
from walt_jax.parallel.roofline import Estimate, Links, estimate
from walt_jax.parallel.rules import check_rules
from walt_jax.parallel.topology import Topology
from walt_jax.training.programs import Program, programs, tracing
from walt_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Reckoned:
    """A device that nothing is compiled for: a GPU in a host."""

    id: int
    slice_index: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0
    num_cores: int = 1


def devices_of(topology: Topology) -> list[Any]:
    """Devices for a mesh that is analysed; of GPUs each host is a slice.

    Raises:
        UserError: see `Topology.devices`.
    """
    if topology.platform == "tpu":
        return topology.devices()
    host = topology.shape[0]
    return [Reckoned(i, i // host, topology.hardware.kinds[0]) for i in range(topology.device_count)]


def mesh_of(config: RunConfig, topology: Topology) -> Mesh:
    """The config's mesh of a topology's devices, to be compiled for where that can be done.

    Raises:
        UserError: if it does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices_of(topology))
    if topology.platform == "tpu" or not topology.compiles:
        return mesh
    devices = {device.id: device for device in topology.devices()}  # they don't know their host
    return Mesh(np.vectorize(lambda device: devices[device.id])(mesh.devices), AXES, axis_types=mesh.axis_types)


def hosts_of(mesh: Mesh, topology: Topology) -> int:
    """How many hosts the mesh's devices are in."""
    if topology.platform != "tpu":
        return topology.slices
    return len({device.process_index for device in mesh.devices.flat})


def links_of(mesh: Mesh, topology: Topology) -> Links:
    """What the mesh's devices are connected by."""
    devices = list(mesh.devices.flat)
    if topology.platform == "tpu":
        return Links.of(devices, topology.hardware, topology.shape)
    numbers = np.array([device.id for device in devices])
    return Links(topology.hardware, numbers[:, None] % topology.shape[0], numbers // topology.shape[0], ())


def plan_hardware(config: RunConfig, topology: Topology, price_per_chip_hour: float | None = None) -> dict[str, Any]:
    """Compiles a config's programs, or analyses them for GPUs that no compiler is installed for.

    Returns:
        `topology`, `hardware` (device kind and its stated peaks), `chips`, `devices`, `mesh` {axis: size}, `programs`,
        a list of what `_entry` returns of each; at the top the figures of the train step, or of the tokenizer's where
        no denoiser is trained; and `hosts` and `tokens_needed_per_second` {"total", "per_host"}, which the data must
        deliver to that step, padding left out; None if it does not fit.

    Raises:
        UserError: if the mesh does not fit the devices or the config.
    """
    mesh = mesh_of(config, topology)
    check_rules(config.rules, mesh)
    entries, made = [], programs(config, mesh)
    with tqdm.tqdm(made.items(), unit="program", dynamic_ncols=True) as progress:  # a large one compiles for minutes
        for name, make in progress:
            progress.set_description(f"{'compiling' if topology.compiles else 'analysing'} {name} for {topology.name}")
            program = make()
            entry = (compiled if topology.compiles else analysed)(program, config, mesh, topology)
            entries.append(priced(entry, topology, price_per_chip_hour))
    main = next(entry for entry in entries if "train" in entry["name"])
    hardware = {k: v for k, v in dataclasses.asdict(topology.hardware).items() if k not in ("kinds", "clock_hz")}
    hosts, needed = hosts_of(mesh, topology), main.get("tokens_per_second")
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "devices": topology.device_count,
        "mesh": dict(mesh.shape),
        **{name: value for name, value in main.items() if name not in ("name", "stage", "parts")},
        "hosts": hosts,
        "tokens_needed_per_second": needed and {"total": needed, "per_host": needed / hosts},
        "hardware": {"device_kind": topology.hardware.kinds[0], **hardware},
        "programs": entries,
    }


def priced(entry: dict[str, Any], topology: Topology, price_per_chip_hour: float | None) -> dict[str, Any]:
    """An entry with what a million clips cost, if there is a price; in the price's currency."""
    if price_per_chip_hour is None or not entry["estimated_step_seconds"]:
        return entry
    hours = entry["estimated_step_seconds"] / 3600 * topology.chips * 1e6 / entry["clips"]
    return {**entry, "chip_hours_per_million_clips": hours, "price_per_million_clips": hours * price_per_chip_hour}


def compiled(program: Program, config: RunConfig, mesh: Mesh, topology: Topology) -> dict[str, Any]:
    """What the compiler says of a program; of one that does not fit only its memory."""
    began = time.perf_counter()
    with tracing(config, mesh):
        lowered = program.jitted.trace(*program.arguments).lower(lowering_platforms=(topology.platform,))
    try:
        executable = lowered.compile()
    except RuntimeError as error:
        needed = too_large(str(error))
        if needed is None:
            raise
        memory = {**program.memory, "temporaries": max(0, needed - sum(program.memory.values()))}
        seconds = time.perf_counter() - began
        return _entry(program, mesh, topology, memory, None, "compiled", seconds, model_flops(program))
    seconds = time.perf_counter() - began
    found = executable.memory_analysis()
    arguments = sum(program.memory.values())
    # Outputs that take no argument's place are new memory.
    memory = {
        **program.memory,
        "other arguments": max(0, found.argument_size_in_bytes - arguments),
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    done = estimate(hlo.Program(executable.as_text()).operations(), links_of(mesh, topology))
    return _entry(program, mesh, topology, memory, done, "compiled", seconds, model_flops(program))


def too_large(message: str) -> int | None:
    """Bytes that a program needs, of the compiler's message that it does not fit; None of other messages."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return round(float(sizes[1]) * 1024 ** " KMGT".index(sizes[2] or " ")) if sizes else 0


def model_flops(program: Program) -> int:
    """Operations of a program without what is recomputed, as an MFU counts them."""
    # Traced for the CPU here, where attention takes no kernel, whose backward pass recomputes too.
    own = analysis.traced(program.own[0], *without_shardings(program.own[1]))
    return jaxpr_flops(own, leave_out=("rematted_computation",))


@dataclasses.dataclass(frozen=True)
class Trace:
    """A data shard's part of a program.

    Attributes:
        operations: see `analysis.operations`.
        peak: see `analysis.peak_bytes`.
        seconds: that tracing took.
    """

    operations: list[hlo.Operation]
    peak: int
    seconds: float


def trace_shard(program: Program, config: RunConfig, mesh: Mesh) -> Trace:
    """The trace of one data shard's part of the batch: the same for all meshes with as many data shards."""
    began = time.perf_counter()
    function, arguments = program.own
    arguments = list(without_shardings(arguments))
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // data_shards(mesh), *leaf.shape[1:]), leaf.dtype),
        [arguments[place] for place in program.batch_arguments],
    )
    for place, part in zip(program.batch_arguments, batch, strict=True):
        arguments[place] = part
    with tracing(config, Mesh(mesh.devices.flat[:1].reshape(1, 1, 1, 1), mesh.axis_names)):
        jaxpr = analysis.traced(function, *arguments)
    return Trace(analysis.operations(jaxpr), analysis.peak_bytes(jaxpr), time.perf_counter() - began)


def analysed(
    program: Program,
    config: RunConfig,
    mesh: Mesh,
    topology: Topology,
    model: int | None = None,
    trace: Trace | None = None,
) -> dict[str, Any]:
    """What a program takes by analysis of its trace, for one data shard's part of the batch.

    Activations and operations are divided evenly by `tensor` and `context`. Element-wise operations are taken to be
    fused with their neighbours; of collectives those are counted that the mesh makes necessary. `model` is
    `model_flops`, and `trace` is `trace_shard`, where these are known.
    """
    trace = trace or trace_shard(program, config, mesh)
    rest = math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis not in BATCH_AXES)
    done = [
        dataclasses.replace(
            each,
            products=[dataclasses.replace(p, flops=p.flops // rest) for p in each.products],
            hbm_bytes=each.hbm_bytes // rest,
        )
        for each in trace.operations
    ]
    parameters, whole = program.memory["parameters"], program.parameter_bytes
    temporaries = trace.peak // rest
    if program.trains:
        # The trace holds all gradients whole; each device keeps its part of them.
        temporaries = max(0, trace.peak - whole) // rest + parameters
        state = sum(program.memory[kind] for kind in ("parameters", "optimizer", "average"))
        done.append(hlo.Operation("optimizer/update", 1, [], 2 * state + parameters, 0, ""))
    done += collectives(program, mesh)
    memory = {**program.memory, "temporaries": temporaries}
    found = estimate(done, links_of(mesh, topology))
    model = model_flops(program) if model is None else model
    return _entry(program, mesh, topology, memory, found, "analysed", trace.seconds, model)


def collectives(program: Program, mesh: Mesh) -> list[hlo.Operation]:
    """The collectives that dividing parameters and batch makes necessary.

    Parameters along `fsdp` are gathered in each pass, their gradients scattered; along `data` gradients are summed.
    With `tensor` each layer's residual is summed twice a pass. All of them run while other operations do.
    """
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))

    def along(axis: str) -> np.ndarray:
        place = mesh.axis_names.index(axis)
        return np.moveaxis(numbers, place, -1).reshape(-1, mesh.shape[axis])

    def made(kind: str, size: float, axis: str, times: int = 1) -> hlo.Operation:
        return hlo.Operation(kind, times, [], 0, 0, "", kind, round(size), along(axis), True)

    whole = program.parameter_bytes / mesh.shape["tensor"]
    found = []
    if mesh.shape["fsdp"] > 1 and program.memory["parameters"] < program.parameter_bytes:
        found.append(made("all-gather", whole * program.compute_bytes / 4, "fsdp", program.passes))
        if program.trains:
            found.append(made("reduce-scatter", whole, "fsdp"))
    if program.trains and mesh.shape["data"] > 1:
        found.append(made("all-reduce", whole / mesh.shape["fsdp"], "data"))
    if mesh.shape["tensor"] > 1:
        found.append(made("all-reduce", program.residual_bytes / data_shards(mesh), "tensor", 2 * program.passes))
    if mesh.shape["context"] > 1:
        size = program.residual_bytes / data_shards(mesh) / mesh.shape["context"]
        found.append(made("all-to-all", size, "context", program.passes))
    return found


def without_shardings(tree: Any) -> Any:
    """Shapes only."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _entry(
    program: Program,
    mesh: Mesh,
    topology: Topology,
    memory: dict[str, int],
    found: Estimate | None,
    how: str,
    seconds: float,
    model: int,
) -> dict[str, Any]:
    """A program's figures.

    Returns:
        `name`, `stage`, `how` ("compiled" or "analysed"), `clips`, `clip`, `model_flops` (without what is recomputed),
        `memory_bytes` {kind: bytes a device}, `hbm_bytes_per_device`, `hbm_limit_bytes`, `fits`, `compile_seconds`;
        and unless it does not fit `estimated_step_seconds`, `estimated_mfu`, `compiler_step_seconds` and
        `compiler_mfu` (the same with the compiler's cycle estimates), `bound_by`, `seconds_by_bound`,
        `seconds_by_part`, `collective_bytes_per_step`, `dcn_bytes_per_step`, `tokens_per_second`.
    """
    memory = {kind: size for kind, size in memory.items() if size}
    needed = sum(memory.values())
    entry = {
        "name": program.name,
        "stage": program.stage,
        "how": how,
        "mesh": dict(mesh.shape),
        "clips": program.clips,
        "clip": list(program.clip),
        "model_flops": model,
        "memory_bytes": memory,
        "hbm_bytes_per_device": needed,
        "hbm_limit_bytes": topology.hardware.hbm_limit_bytes,
        "fits": needed <= topology.hardware.hbm_limit_bytes and found is not None,
        "compile_seconds": round(seconds, 1),
        "estimated_step_seconds": None,
        "estimated_mfu": None,
    }
    if found is None:
        return entry
    ideal = model / topology.device_count / topology.hardware.peak_flops
    return entry | {
        "estimated_step_seconds": found.seconds,
        "estimated_mfu": ideal / found.seconds,
        "compiler_step_seconds": found.compiler_seconds or None,
        "compiler_mfu": ideal / found.compiler_seconds if found.compiler_seconds else None,
        "bound_by": found.bound_by,
        "seconds_by_bound": found.bound,
        "seconds_by_part": found.parts,
        "executed_flops_per_device": found.flops,
        "hbm_traffic_bytes_per_device": found.hbm_bytes,
        "collective_bytes_per_step": found.collective_bytes,
        "dcn_bytes_per_step": found.dcn_bytes,
        "tokens_per_second": program.tokens / found.seconds,
    }


def duration(seconds: float) -> str:
    """A time with three digits and its unit, such as "45.0 µs"."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{f'{seconds / size:#.3g}'.rstrip('.')} {unit}"


def sentences(plan: dict[str, Any]) -> list[str]:
    """What a plan on hardware says, a line a program."""
    peak = plan["hardware"]["peak_flops"] / 1e12
    lines = [
        f"on {plan['topology']}: {plan['chips']} chips, mesh {described(plan['mesh'])}, {plan['how']}; MFU is of a "
        f"peak of {peak:,.0f} TFLOP/s a device, stated for dense bfloat16"
    ]
    for entry in plan["programs"]:
        memory = f"{entry['hbm_bytes_per_device'] / 2**30:6.2f} of {entry['hbm_limit_bytes'] / 2**30:.2f} GiB"
        line = f"{entry['name']:21} {entry['clips']:5} clips {memory} a device"
        if entry["estimated_step_seconds"] is None:
            lines.append(f"{line}: does not fit")
            continue
        line += "" if entry["fits"] else ", DOES NOT FIT"
        line += f"; {duration(entry['estimated_step_seconds']):>7}, {entry['estimated_mfu']:.1%} MFU"
        line += f", bound by {entry['bound_by']}"
        if entry["compiler_mfu"]:
            line += f" ({entry['compiler_mfu']:.1%} by the compiler's cycles)"
        if "price_per_million_clips" in entry:
            line += f"; {entry['price_per_million_clips']:,.2f} a million clips"
        lines.append(line)
    if needed := plan["tokens_needed_per_second"]:
        each = f", {needed['per_host']:,.0f} from each of {plan['hosts']} hosts" if plan["hosts"] > 1 else ""
        lines.append(
            f"the data must deliver {needed['total']:,.0f} tokens a second to train at that speed{each}; "
            "--mode=benchmark says how many a host does"
        )
    return lines
