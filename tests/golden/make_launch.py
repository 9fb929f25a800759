"""Writes what the launchers' dry runs print, after a wanted change: python -m tests.golden.make_launch."""

import contextlib
import importlib
import io
import pathlib

from launch.command_line import CLONE

FOLDER = pathlib.Path(__file__).parent / "launch"
TRAINER = [
    "--",
    "--config=configs/walt_l.py",
    "--config.data.source=/data/my clips; $(reboot)",
    "--config.mesh.fsdp=-1",
]
COMMANDS = {
    "tpu_vm": ["launch", "create", "wait", "copy", "run", "stop", "resume", "status", "delete"],
    "gke": ["build", "launch", "status", "logs", "delete"],
    "slurm": ["launch", "status", "stop"],
    "gpu_host": ["launch"],
}
CLUSTERS = {
    "tpu_v5e": "tpu_vm",
    "tpu_v5p_2_slices": "tpu_vm",
    "gke_v5e": "gke",
    "gke_v5p_2_slices": "gke",
    "xpk_v6e": "gke",
    "slurm_h100": "slurm",
    "gpu_host": "gpu_host",
}


def dry_run(cluster: str, command: str, trainer: list[str] | None = None) -> str:
    """What a command prints for one of launch/clusters/, with CLONE for the clone's folder."""
    trainer = trainer or (TRAINER if command in ("launch", "resume", "run") else [])
    file = f"{CLONE}/launch/clusters/{cluster}.toml"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        launcher = importlib.import_module(f"launch.{CLUSTERS[cluster]}")
        assert launcher.run([command, f"--cluster={file}", "--name=walt-l-1", "--dry_run", *trainer]) == 0
    return printed.getvalue().replace(CLONE, "CLONE")


def dry_runs(cluster: str) -> str:
    """What all commands print."""
    return "\n".join(f"### {command}\n{dry_run(cluster, command)}" for command in COMMANDS[CLUSTERS[cluster]])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CLUSTERS:
        (FOLDER / f"{name}.txt").write_text(dry_runs(name), encoding="utf-8")
