"""Devices by the name of what one rents, such as `v5p:4x4x8`, to compile for without one."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from walt_jax.errors import UserError
from walt_jax.parallel.hardware import HARDWARE, Hardware, of_kind, slice_of

EXAMPLES = {
    "v4": "v4:4x4x4",
    "v5e": "v5e:4x4",
    "v5p": "v5p:4x4x8",
    "v6e": "v6e:4x4",
    "tpu7x": "tpu7x:2x2x2",
    "h100": "h100:8",
    "h200": "h200:8x4",
    "b200": "b200:8",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
        name: as it was written.
        hardware: of each device.
        shape: of a slice of TPUs its chips along each axis; of GPUs (those of a host,).
        slices: groups with fast links within and slow ones between them: slices of TPUs, hosts of GPUs.
    """

    name: str
    hardware: Hardware
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def device_count(self) -> int:
        return self.chips * self.hardware.chip_devices

    @property
    def platform(self) -> str:
        """What JAX calls their platform: "tpu" or "cuda"."""
        return "tpu" if self.hardware.torus_axes else "cuda"

    @property
    def compiles(self) -> bool:
        """Whether programs are compiled for it: for TPUs always, for GPUs where JAX's plugin for CUDA is installed."""
        return self.platform == "tpu" or any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))

    def devices(self) -> list[Any]:
        """Devices that aren't attached, for `jax.sharding.Mesh`.

        Raises:
            UserError: if libtpu is missing or has no such slice.
        """
        from jax.experimental import topologies

        if self.platform == "cuda":
            of_host = self.shape[0]
            return list(
                topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=self.name,
                    topology=f"1x{self.slices}x{of_host}",
                    target_config=_gpu_target(self.hardware),
                ).devices
            )
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={self.name} is compiled by libtpu, which is not installed; pip install -e '.[tpu]' adds "
                "it, no TPU is needed."
            )
        # It is not asked on which machine this is, and two plans may run at once.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # It would warn that there is no TPU. The type need not be that of the topology.
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        options: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        kind = next(kind for kind, hardware in HARDWARE.items() if hardware is self.hardware)
        dims = "x".join(map(str, self.shape))
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{dims}", **options).devices)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--topology={self.name} is no slice that libtpu knows ({reason}); {_known()}") from error


def _gpu_target(hardware: Hardware) -> str:
    """A GPU as XLA describes it to its compiler: a `GpuTargetConfigProto` in text format."""
    capability, cores, l2_cache, gigahertz = hardware.gpu
    return f"""
        platform_name: "CUDA"
        device_description_str: "{hardware.kinds[0]}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} }}
          core_count: {cores}
          l2_cache_size: {l2_cache}
          clock_rate_ghz: {gigahertz}
          device_memory_size: {hardware.hbm_bytes}
          memory_bandwidth: {round(hardware.hbm_bytes_per_second)}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          fpus_per_core: 128
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}"""


def topology(name: str) -> Topology:
    """The devices that a name stands for: `KIND:SHAPE`, before it how many of them, as in `2x v5e:16x16`.

    Raises:
        UserError: if there is no such name.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s+)?([a-z]\w*):(\d+(?:x\d+)*)\s*", name.lower())
    hardware = match and HARDWARE.get(match[2])
    if not hardware:
        raise UserError(f"--topology={name} is not known; {_known()}")
    slices, shape = int(match[1] or 1), tuple(int(size) for size in match[3].split("x"))
    if not slices or not all(shape):
        raise UserError(f"--topology={name} has no devices; {_known()}")
    if not hardware.torus_axes:
        if len(shape) > 2 or shape[0] > hardware.host_devices:
            raise UserError(
                f"--topology={name}: a host has at most {hardware.host_devices} GPUs; write {match[2]}:GPUSxHOSTS, "
                f"such as {match[2]}:8x4."
            )
        return Topology(name, hardware, shape[:1], slices * (shape[1] if len(shape) == 2 else 1))
    if len(shape) != hardware.torus_axes:
        raise UserError(
            f"--topology={name}: slices of {match[2]} have {hardware.torus_axes} sides, such as {EXAMPLES[match[2]]}."
        )
    return Topology(name, hardware, shape, slices)


def attached(devices: Sequence[Any]) -> Topology:
    """The devices of this run, as the topology that they are.

    Raises:
        UserError: if their kind is not in the table of hardware.
    """
    kind = devices[0].device_kind
    hardware = of_kind(kind)
    if hardware is None:
        raise UserError(f"--auto_mesh knows {', '.join(HARDWARE)}, and the devices here are {kind!r}; set config.mesh.")
    slices = len(set(map(slice_of, devices)))
    name = next(name for name, each in HARDWARE.items() if each is hardware)
    if not hardware.torus_axes:
        hosts = len({device.process_index for device in devices})
        return Topology(f"{name}:{len(devices) // hosts}x{hosts}", hardware, (len(devices) // hosts,), hosts)
    places = [device.coords for device in devices]
    shape = tuple(len({place[axis] for place in places}) for axis in range(hardware.torus_axes))
    dims = "x".join(map(str, shape))
    return Topology(f"{slices}x {name}:{dims}" if slices > 1 else f"{name}:{dims}", hardware, shape, slices)


def _known() -> str:
    return f"choose one like {', '.join(EXAMPLES.values())}, or several slices, like '2x v5e:16x16'."
