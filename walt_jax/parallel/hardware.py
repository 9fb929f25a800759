"""What accelerators can do, as their makers state it: the peaks that plans, benchmarks and logs divide by."""

import dataclasses
from typing import Any

GIB = 2**30
# JAX takes this part of a GPU's memory when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One accelerator, as JAX sees it: a device. All rates are of one device, and peaks that no program reaches.

    Attributes:
        kinds: beginnings of `jax.Device.device_kind`.
        peak_flops: dense bfloat16 operations a second.
        hbm_bytes: memory of a device.
        hbm_limit_bytes: the part of it that a program can have.
        hbm_bytes_per_second: bandwidth of that memory.
        link_bytes_per_second: of one link to a neighbour, one way. Of a GPU, to all others of its host together.
        torus_axes: dimensions of the torus of links; 0 where a switch connects all devices of a host.
        wrap: how many devices along an axis of the torus close it to a ring; shorter axes are lines.
        dcn_bytes_per_second: to other slices or hosts, one way, an equal part of what their host has.
        matrix_unit: side of the systolic array; a product's sides are padded to multiples of it.
        clock_hz: of the compiler's cycle estimates; 0 where no compiler here gives any.
        chip_devices: devices of a chip.
        host_devices: the most that share a host.
        gpu: what XLA's compiler for GPUs asks for: compute capability, multiprocessors, bytes of L2 cache, GHz.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_limit_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    torus_axes: int
    wrap: int
    dcn_bytes_per_second: float
    matrix_unit: int = 128
    clock_hz: float = 0.0
    chip_devices: int = 1
    host_devices: int = 8
    gpu: tuple[int, int, int, float] = (0, 0, 0, 0.0)


def _tpu(
    kinds: tuple[str, ...],
    peak: float,
    memory: tuple[float, float],
    bandwidth: float,
    link: float,
    torus_axes: int,
    dcn_gigabits: float,
    matrix_units: tuple[int, int],
    host_devices: int,
    chip_devices: int = 1,
) -> Hardware:
    """A device of a chip. `matrix_units` is (side, number a chip): they give the clock, as each does side² × 2 a cycle.

    A v4 or v5p is two cores that JAX uses as one device; a tpu7x is two devices.
    """
    side, number = matrix_units
    return Hardware(
        kinds,
        peak / chip_devices,
        round(memory[0] * GIB / chip_devices),
        round(memory[1] * GIB),
        bandwidth / chip_devices,
        link / chip_devices,
        torus_axes,
        16 if torus_axes == 2 else 4,
        dcn_gigabits * 1e9 / 8 / chip_devices,
        side,
        peak / (2 * side**2 * number),
        chip_devices,
        host_devices,
    )


def _gpu(
    kind: str,
    peak: float,
    gigabytes: float,
    bandwidth: float,
    nvlink: float,
    nic_gigabits: float,
    gpu: tuple[int, int, int, float],
) -> Hardware:
    memory = round(gigabytes * 1e9)
    limit = round(GPU_MEMORY_FRACTION * memory)
    dcn = nic_gigabits * 1e9 / 8
    return Hardware((kind,), peak, memory, limit, bandwidth, nvlink, 0, 0, dcn, matrix_unit=16, gpu=gpu)


# TPUs: Cloud TPU's page of each version for peak, HBM and DCN (v5e: a pod's 6.4 Tb/s over its 256 chips; v4: no page
# states it, a host's 200 Gb/s over 4 chips is assumed). Limits: the compiler's own, in its messages "Used … of …G hbm".
# Links one way, and axes that wrap: "How To Scale Your Model" (Austin et al. 2025), part 2; the pages of the versions
# state a tenth more. Matrix units: jax.experimental.pallas.tpu.get_tpu_info_for_chip and the pages.
# GPUs: NVIDIA's data sheets, of which the bfloat16 figures here are half, as those count sparsity; NVLink one way; a
# NIC of 400 Gb/s a GPU, as DGX has.
HARDWARE = {
    "v4": _tpu(("TPU v4",), 275e12, (32, 30.75), 1.2e12, 45e9, 3, 50, (128, 8), 4),
    "v5e": _tpu(("TPU v5 lite", "TPU v5e"), 197e12, (16, 15.75), 819e9, 45e9, 2, 25, (128, 4), 8),
    "v5p": _tpu(("TPU v5p", "TPU v5"), 459e12, (95.74, 95.74), 2.765e12, 90e9, 3, 50, (128, 8), 4),
    "v6e": _tpu(("TPU v6 lite", "TPU v6e"), 918e12, (32, 31.25), 1.638e12, 90e9, 2, 100, (256, 4), 8),
    "tpu7x": _tpu(("TPU7x",), 2307e12, (192, 94.75), 7.38e12, 90e9, 3, 100, (256, 8), 8, chip_devices=2),
    "h100": _gpu("NVIDIA H100", 989e12, 80, 3.35e12, 450e9, 400, (9, 132, 50 * 2**20, 1.98)),
    "h200": _gpu("NVIDIA H200", 989e12, 141, 4.8e12, 450e9, 400, (9, 132, 50 * 2**20, 1.98)),
    "b200": _gpu("NVIDIA B200", 2250e12, 180, 8e12, 900e9, 400, (10, 148, 126 * 2**20, 1.97)),
}


def of_kind(device_kind: str) -> Hardware | None:
    """The hardware whose devices are called so by JAX; None if it is not in the table, such as a CPU."""
    named = ((kind, hardware) for hardware in HARDWARE.values() for kind in hardware.kinds)
    # The longest beginning: "TPU v5 lite" also begins with "TPU v5".
    return max(((k, h) for k, h in named if device_kind.startswith(k)), key=lambda e: len(e[0]), default=(0, None))[1]


def slice_of(device: Any) -> int:
    """The number of the slice that a device is in; 0 where there are none."""
    return getattr(device, "slice_index", None) or 0


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device, as its maker states it; None if unknown."""
    hardware = of_kind(device_kind)
    return hardware and hardware.peak_flops
