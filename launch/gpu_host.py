"""Trains on one host's GPUs, in one process, and starts again after crashes.

python -m launch.gpu_host launch --cluster=launch/clusters/gpu_host.toml --name=NAME -- --config=configs/NAME.py
"""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence

from launch.command_line import main, parse, trainer_command
from launch.restart import supervise


@dataclasses.dataclass(frozen=True)
class GpuHost:
    """One host of GPUs; its TOML file has these keys.

    Args:
        runs: the folder of the runs, each in one named after it.
        python: the Python that has walt_jax, with the extra `cuda`.
        max_restarts: after exit codes 42 and 127 to 255, how many times at most.
        pause_seconds: before each restart.
        env: environment variables of the trainer, such as CUDA_VISIBLE_DEVICES.
    """

    runs: str
    python: str = "python"
    max_restarts: int = 10
    pause_seconds: int = 10
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.pause_seconds < 0:
            raise ValueError("max_restarts and pause_seconds should not be negative.")


COMMANDS = {"launch": "trains, or resumes where the run stopped; Ctrl-C or SIGTERM saves and ends it"}


def run(argv: Sequence[str]) -> int:
    """Runs the trainer; its exit code."""
    flags, host = parse("launch.gpu_host", __doc__, GpuHost, COMMANDS, argv)
    runs = str(pathlib.Path(host.runs).expanduser())
    command = trainer_command(host.python, runs, flags.name, flags.trainer, host.env)
    if flags.dry_run:
        print(shlex.join(command))
        print(
            f"# after exit codes 42 and 127-255 again, {host.max_restarts} times at most, {host.pause_seconds} s later"
        )
        return 0
    print(f"+ {shlex.join(command)}", flush=True)
    return supervise(command, host.max_restarts, host.pause_seconds)


if __name__ == "__main__":
    main(run)
