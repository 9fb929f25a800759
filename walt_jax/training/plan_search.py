"""Meshes, remat policies and accumulation tried by analysis, the best first."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from walt_jax.errors import UserError
from walt_jax.parallel.mesh import MeshConfig, data_shards, described, make_mesh
from walt_jax.parallel.topology import Topology
from walt_jax.training.plan_hardware import Trace, analysed, devices_of, duration, model_flops, trace_shard
from walt_jax.training.programs import changed, train_step
from walt_jax.training.run_config import RunConfig

SLOW = 0.5  # a train step below this MFU has others tried
SHOWN = 8  # rows of a ranking
KEPT = ("hbm_bytes_per_device", "fits", "estimated_step_seconds", "estimated_mfu", "bound_by")
MOST = 32  # micro-batches


def meshes(topology: Topology) -> Iterator[MeshConfig]:
    """A small list: all copies; all divided; divided within a slice; both of these with heads divided, too."""
    inside = topology.device_count // topology.slices
    seen = set()
    for tensor in (1, 2, 4):
        for fsdp in (1, topology.hardware.host_devices // tensor, inside // tensor):
            if 0 < fsdp * tensor <= inside and inside % (fsdp * tensor) == 0 and (fsdp, tensor) not in seen:
                seen.add((fsdp, tensor))
                yield MeshConfig(data=-1, fsdp=fsdp, tensor=tensor)


def ranked(config: RunConfig, topology: Topology, remats: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The train step's analysis on each mesh, with each remat policy: first those that fit, the fastest first.

    Args:
        config: its own mesh and policy are among those tried.
        topology: the devices.
        remats: policies; by default all of the denoiser's, or of the tokenizer's where there is no denoiser.

    Returns:
        For each {"mesh", "remat", "accumulate", "hbm_bytes_per_device", "fits", "estimated_step_seconds",
        "estimated_mfu", "bound_by"}. Meshes that don't divide the model or the batch are left out.
    """
    devices, model = devices_of(topology), None
    rows: dict[Any, dict[str, Any]] = {}  # by mesh, policy and micro-batches
    traces: dict[Any, Trace] = {}  # by data shards, policy and micro-batches
    name = _model(config)
    if remats is None:
        remats = typing.get_args(typing.get_type_hints(type(getattr(config, name)))["remat"])
    stage = (config.denoiser_stages or config.trained_stages)[-1]
    tried_meshes = dict.fromkeys((config.mesh, *meshes(topology)))
    for mesh_config in tqdm.tqdm(tried_meshes, desc="ranking meshes", unit="mesh", dynamic_ncols=True):
        try:
            mesh = make_mesh(mesh_config, devices)
            made = train_step(_accumulating(config, stage, 1), stage, mesh)
        except (UserError, ValueError):  # it does not divide the model or the batch
            continue
        model = model or model_flops(made)  # the same for all
        for remat in remats:
            tried = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), remat=remat)})
            accumulate = 1
            while accumulate <= MOST:
                try:
                    own = _accumulating(tried, stage, accumulate)
                    program = changed(made, own, mesh)
                except (UserError, ValueError):
                    break
                if (key := (*mesh.shape.values(), remat, accumulate)) not in rows:
                    like = (data_shards(mesh), remat, accumulate)
                    traces[like] = traces.get(like) or trace_shard(program, own, mesh)
                    entry = analysed(program, own, mesh, topology, model, traces[like])
                    row = {"mesh": dict(mesh.shape), "remat": remat, "accumulate": accumulate}
                    rows[key] = row | {name: entry[name] for name in KEPT}
                if rows[key]["fits"]:
                    break
                # At least twice as many; with half of them no more than half of the memory is freed.
                times = rows[key]["hbm_bytes_per_device"] / topology.hardware.hbm_limit_bytes
                accumulate *= 2 ** max(1, math.ceil(math.log2(times)))
    return sorted(rows.values(), key=lambda row: (not row["fits"], row["estimated_step_seconds"]))


def _model(config: RunConfig) -> str:
    """The field of the model that the last stage trains."""
    return "tokenizer" if config.denoiser is None else "denoiser"


def _accumulating(config: RunConfig, name: str, count: int) -> RunConfig:
    """The config with so many micro-batches in a stage.

    Raises:
        ValueError: if they don't divide the batch, or it has packs.
    """
    stage = dataclasses.replace(config.stages[name], accumulate=count)
    return dataclasses.replace(config, stages={**config.stages, name: stage})


def ranking_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A ranking as text."""
    lines = ["others by analysis, the best first:"]
    for row in rows[:SHOWN]:
        lines.append(
            f"  {described(row['mesh']):28} remat {row['remat']:12} accumulate {row['accumulate']} "
            f"{row['hbm_bytes_per_device'] / 2**30:7.2f} GiB {'fits' if row['fits'] else 'does not fit':12} "
            f"{duration(row['estimated_step_seconds']):>7} {row['estimated_mfu']:6.1%} MFU, bound by {row['bound_by']}"
        )
    return lines


def best_mesh(config: RunConfig, topology: Topology) -> MeshConfig:
    """The fastest mesh that fits, with the config's own remat policy.

    Raises:
        UserError: if none fits.
    """
    rows = ranked(config, topology, (getattr(config, _model(config)).remat,))
    if not rows or not rows[0]["fits"]:
        needed = f" (the smallest takes {min(r['hbm_bytes_per_device'] for r in rows) / 2**30:.1f} GiB)" if rows else ""
        raise UserError(
            f"--auto_mesh finds no mesh of {topology.name} that the train step fits on{needed}; use more devices, "
            f'a smaller batch_size or --config.{_model(config)}.remat="block".'
        )
    return MeshConfig(**rows[0]["mesh"])
