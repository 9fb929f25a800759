"""Running the command line as users do: in a process of its own, from the repository's root."""

import concurrent.futures
import functools
import json
import mmap
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jaxlib
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--config=configs/walt_tiny.py"


@functools.cache
def quick_flags() -> str:
    """XLA's flags for small programs: its newer emitters of fused loops take two thirds of the time of compiling them.

    A JAX that doesn't know the flag gets none: XLA would end the process.
    """
    flag = "xla_cpu_use_fusion_emitters"
    for path in pathlib.Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            if library.find(flag.encode()) >= 0:
                return f"--{flag}=false"
    return ""


def start(*flags: str, cache: pathlib.Path, quick: bool = True, devices: int = 0) -> subprocess.Popen:
    """Starts `python -m walt_jax.main`; compiled programs are kept in `cache`, as users keep them in their home.

    With `quick` they are compiled without most optimizations: what is run
    a few times costs more to compile than to run. With `devices` there are so many virtual CPU devices.
    """
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment |= {"XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flag}".strip(), "JAX_PLATFORMS": "cpu"}
    if quick:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    else:  # without what `conftest` adds
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "").replace(quick_flags(), "").strip()
    command = [sys.executable, "-m", "walt_jax.main", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*flags: str, cache: pathlib.Path, quick: bool = True) -> tuple[int, str, str]:
    """Runs it to its end; returns (exit code, standard output, standard error)."""
    process = start(*flags, cache=cache, quick=quick)
    out, err = process.communicate()
    return process.returncode, out, err


def start_together(*flags: str, cache: pathlib.Path, processes: int, devices: int) -> list[subprocess.Popen]:
    """Starts so many processes of one run, each with so many virtual devices, which communicate through Gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    others = [f"--coordinator={address}", f"--num_processes={processes}"]
    return [start(*flags, *others, f"--process_id={index}", cache=cache, devices=devices) for index in range(processes)]


def ended(processes: list[subprocess.Popen], seconds: float | None = None) -> tuple[list[int], list[str]]:
    """(exit codes, standard errors); all are killed if they don't end in time."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:  # or a full pipe would stop one of them
        try:
            errors = [err for _, err in pool.map(lambda process: process.communicate(timeout=seconds), processes)]
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
            raise
    return [process.returncode for process in processes], errors


def losses(workdir: pathlib.Path) -> list[tuple[str, int, str]]:
    """(stage, step, loss) of each line of `metrics.jsonl`; the loss as its digits: equal to the last bit."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], repr(row["loss"])) for row in rows]


def measured(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on time."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = re.compile(r"second|data_wait|goodput|flops|mfu|memory|warnings")
    return [{name: value for name, value in row.items() if not timed.search(name)} for row in rows]


def trained(workdir: pathlib.Path) -> dict[str, Any]:
    """Parameters and their averages in each stage's last checkpoint."""
    last = {
        stage.name: max((path for path in stage.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
        for stage in (workdir / "checkpoints").iterdir()
    }
    with ocp.PyTreeCheckpointer() as reader:
        return {
            name: {part: _arrays(reader, path / part) for part in ("weights", "ema")} for name, path in last.items()
        }


def _arrays(reader: ocp.PyTreeCheckpointer, path: pathlib.Path) -> Any:
    """What a checkpoint holds, in memory, on whichever devices it was saved."""
    tree = reader.metadata(path).item_metadata.tree
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, restore_args=as_arrays)
