"""Trains on GPU nodes of a Slurm cluster, one process a GPU, from a login node that shares its files with them.

python -m launch.slurm launch --cluster=launch/clusters/slurm_h100.toml --name=NAME -- --config=configs/NAME.py
"""

import dataclasses
from collections.abc import Sequence

from launch.command_line import CLONE, execute, main, must, parse, trainer_command


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A partition of GPU nodes; its TOML file has these keys.

    Args:
        runs: an absolute path on the shared file system: the folder of the runs, each in one named after it.
        python: an absolute path there: the Python that has walt_jax, with the extra `cuda`.
        nodes: how many.
        gpus_per_node: all are used, each by a process.
        cpus_per_gpu: cores that decode data and feed one GPU.
        time: a job's limit, such as 24:00:00; the trainer saves before it, and the job is queued again.
        partition: Slurm's default without.
        account: likewise.
        qos: likewise.
        constraint: features of nodes, such as h100.
        grace_seconds: how long before the time limit the trainer is asked to save.
        max_restarts: on the same nodes after crashes, and as often in the queue after the trainer saved.
        pause_seconds: before a restart on the same nodes.
        env: environment variables of the trainer.
    """

    runs: str
    python: str
    nodes: int
    gpus_per_node: int
    cpus_per_gpu: int
    time: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    grace_seconds: int = 300
    max_restarts: int = 20
    pause_seconds: int = 30
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("runs", "python"):
            path = getattr(self, key)
            if not path.startswith("/") or "%" in path:  # Slurm expands % in the names of logs
                raise ValueError(f"{key} = {path!r} should be an absolute path that all nodes share, without %.")
        if min(self.nodes, self.gpus_per_node, self.cpus_per_gpu) < 1:
            raise ValueError("nodes, gpus_per_node and cpus_per_gpu should be at least 1.")
        if min(self.max_restarts, self.pause_seconds) < 0 or not 0 < self.grace_seconds < 65536:
            raise ValueError("max_restarts, pause_seconds should not be negative, and grace_seconds 1 to 65535.")


COMMANDS = {
    "launch": "queues the run; resumes where it stopped",
    "status": "its jobs",
    "stop": "cancels it; the trainer saves within the cluster's KillWait, and it is not queued again",
}


def sbatch(slurm: Slurm, name: str, trainer: Sequence[str]) -> list[str]:
    """The command that queues a run."""
    options = {
        "job-name": name,
        "nodes": slurm.nodes,
        # JAX gives a process the GPU of its number on the node, of all of them: so none are bound to tasks here.
        "gpus-per-node": slurm.gpus_per_node,
        "ntasks-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_gpu,
        "time": slurm.time,
        "signal": f"TERM@{slurm.grace_seconds}",
        "open-mode": "append",
        "output": f"{slurm.runs.rstrip('/')}/{name}.log",
        "chdir": CLONE,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    flags = [f"--{key}={value}" for key, value in options.items() if value is not None]
    command = trainer_command(slurm.python, slurm.runs, name, trainer, slurm.env)
    script = [f"{CLONE}/launch/slurm_job.sh", str(slurm.max_restarts), str(slurm.pause_seconds)]
    return ["sbatch", "--exclusive", "--requeue", *flags, *script, *command]


def run(argv: Sequence[str]) -> int:
    """Runs one of COMMANDS; the exit code."""
    flags, slurm = parse("launch.slurm", __doc__, Slurm, COMMANDS, argv)
    name, dry_run = flags.name, flags.dry_run
    match flags.command:
        case "launch":
            command = sbatch(slurm, name, flags.trainer)
            must(["mkdir", "-p", slurm.runs], dry_run)
            must(command, dry_run)
        case "status":
            return min(execute(["squeue", "--me", f"--name={name}"], dry_run), 1)
        case "stop":
            must(["scancel", "--me", f"--name={name}"], dry_run)
    return 0


if __name__ == "__main__":
    main(run)
