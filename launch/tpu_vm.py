"""Trains on Cloud TPU VMs: one queued resource of one or several slices.

python -m launch.tpu_vm launch --cluster=launch/clusters/tpu_v5e.toml --name=NAME -- --config=configs/NAME.py
"""

import dataclasses
import json
import pathlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence

from launch.cluster_file import LaunchError
from launch.command_line import CLONE, execute, main, must, output, parse, trainer_command

POLL_SECONDS = 30
WAITING = {"CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES"}
PREEMPTED = {"SUSPENDING", "SUSPENDED", "FAILED"}  # nothing is left of the TPUs, and the name is still taken


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A kind of queued resource; its TOML file has these keys.

    Args:
        project: the Google Cloud project.
        zone: such as us-west4-a.
        accelerator_type: such as v5litepod-16, v5p-128 or v6e-256: one slice.
        runtime_version: the VMs' image, such as v2-alpha-tpuv5-lite.
        runs: where runs are kept, each in a folder named after it: gs://BUCKET/FOLDER, or the path that every worker
            mounts `nfs` at. A VM's own disk is lost with it.
        nfs: HOST:/SHARE of a file system, mounted at `runs`.
        slices: how many slices, connected over the data center's network.
        spot: preemptible capacity.
        reserved: capacity of a reservation.
        valid_until_duration: how long the request may wait, such as 6h; without, until it is deleted.
        service_account: of the VMs; the project's default without.
        internal_ips: VMs without external addresses, reached through Identity-Aware Proxy; they need Cloud NAT.
        max_preemptions: how many times `launch` asks for capacity anew.
        max_restarts: of the trainer on the same VMs, after exit codes 42 and 127 to 255.
        pause_seconds: before each restart: all workers should have noticed that one failed.
        env: environment variables of the trainer.
    """

    project: str
    zone: str
    accelerator_type: str
    runtime_version: str
    runs: str
    nfs: str | None = None
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    valid_until_duration: str | None = None
    service_account: str | None = None
    internal_ips: bool = False
    max_preemptions: int = 20
    max_restarts: int = 10
    pause_seconds: int = 10
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise ValueError(f"slices = {self.slices} should be at least 1.")
        if min(self.max_preemptions, self.max_restarts, self.pause_seconds) < 0:
            raise ValueError("max_preemptions, max_restarts and pause_seconds should not be negative.")
        if self.accelerator_type.startswith("tpu7x"):
            raise ValueError("tpu7x is available on GKE only; use python -m launch.gke.")
        if self.spot and self.reserved:
            raise ValueError("spot and reserved exclude each other; leave one out.")
        if self.nfs is None and not self.runs.startswith("gs://"):
            raise ValueError(
                f"runs = {self.runs!r} would be on the VMs' own disks, which are lost at a preemption; name "
                "gs://BUCKET/FOLDER, or the file system that is mounted there: nfs = 'HOST:/SHARE'."
            )
        if self.nfs is not None and not (self.runs.startswith("/") and ":/" in self.nfs):
            raise ValueError("nfs should be HOST:/SHARE, and runs the absolute path that it is mounted at.")


COMMANDS = {
    "launch": "all of the following up to run; resumes after preemptions",
    "create": "asks for the TPUs",
    "wait": "waits until they are there",
    "copy": "copies the clone's last commit to all workers and installs it",
    "run": "trains on all workers, or shows the log of what runs; Ctrl-C leaves it running",
    "stop": "the trainer saves and ends; the TPUs stay",
    "resume": "after a preemption that no launch watched: delete and launch",
    "status": "the queued resource's state",
    "delete": "gives the TPUs back; what runs is lost since the last checkpoint",
}


def gcloud(verb: str, vm: TpuVm, *arguments: str) -> list[str]:
    """A command on queued resources."""
    place = [f"--project={vm.project}", f"--zone={vm.zone}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *arguments, *place]


def create(vm: TpuVm, name: str, dry_run: bool) -> None:
    """Asks for the TPUs."""
    nodes = [f"--node-count={vm.slices}", f"--node-prefix={name}"] if vm.slices > 1 else [f"--node-id={name}"]
    kind = [f"--accelerator-type={vm.accelerator_type}", f"--runtime-version={vm.runtime_version}"]
    switches = {"--spot": vm.spot, "--reserved": vm.reserved, "--internal-ips": vm.internal_ips}
    optional = {"--valid-until-duration": vm.valid_until_duration, "--service-account": vm.service_account}
    more = [flag for flag, on in switches.items() if on]
    more += [f"{flag}={value}" for flag, value in optional.items() if value is not None]
    must(gcloud("create", vm, name, *nodes, *kind, *more), dry_run)


def state(vm: TpuVm, name: str) -> str:
    """The queued resource's state, such as ACTIVE; NOT_FOUND if there is none.

    Raises:
        LaunchError: if gcloud can't say.
    """
    text = output(gcloud("list", vm, f"--filter=name:{name}", "--format=json"))
    if text is None:
        raise LaunchError("The queued resource's state is unknown, see the message above; mend it and try again.")
    for resource in json.loads(text or "[]"):
        if resource["name"].rsplit("/", 1)[-1] == name:
            found = resource.get("state", {})
            return found.get("state", "UNKNOWN") if isinstance(found, dict) else found
    return "NOT_FOUND"


def wait(vm: TpuVm, name: str, dry_run: bool) -> None:
    """Waits until the TPUs are there.

    Raises:
        LaunchError: if they will not be.
    """
    if dry_run:
        execute(gcloud("list", vm, f"--filter=name:{name}", "--format=json"), dry_run)
        print(f"# every {POLL_SECONDS} s until its state is ACTIVE")
        return
    last = None
    while (now := state(vm, name)) != "ACTIVE":
        if now not in WAITING | {"UNKNOWN"}:
            raise LaunchError(f"The queued resource {name} is {now}; start again with the command resume.")
        if now != last:
            print(f"{name} is {now}", flush=True)
        last = now
        time.sleep(POLL_SECONDS)


def on_workers(vm: TpuVm, name: str, command: str) -> list[str]:
    """A command that runs a shell's command line on all workers of all slices at once."""
    return gcloud("ssh", vm, name, *_everywhere(vm), f"--command={command}")


def _everywhere(vm: TpuVm) -> list[str]:
    tunnel = ["--tunnel-through-iap"] if vm.internal_ips else []
    return ["--node=all", "--worker=all", "--batch-size=all", "--quiet", *tunnel]


def worker(*arguments: str) -> str:
    """The command line that runs `worker.sh` on a worker."""
    return shlex.join(["bash", "walt_jax/launch/worker.sh", *arguments])


def copy(vm: TpuVm, name: str, dry_run: bool) -> None:
    """Copies the clone's last commit to all workers and installs it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = "walt_jax.tar.gz"
        path = archive if dry_run else str(pathlib.Path(folder) / archive)
        must(["git", "-C", CLONE, "archive", "--format=tar.gz", f"--output={path}", "HEAD"], dry_run)
        if not dry_run and output(["git", "-C", CLONE, "status", "--porcelain"]):
            print("warning: changes that are not committed are not copied; commit them first", file=sys.stderr)
        must(gcloud("scp", vm, path, f"{name}:{archive}", *_everywhere(vm)), dry_run)
    unpack = f"mkdir -p walt_jax && tar -xzf {archive} -C walt_jax"
    mount = ["--nfs", vm.nfs, vm.runs] if vm.nfs else []
    must(on_workers(vm, name, f"{unpack} && {worker('install', *mount)}"), dry_run)


def train(vm: TpuVm, name: str, trainer: Sequence[str], dry_run: bool) -> int:
    """Trains on all workers, or shows the log of what runs there already; 0 if it is done."""
    command = trainer_command("python", vm.runs, name, trainer, vm.env)
    start = worker("run", str(vm.max_restarts), str(vm.pause_seconds), *command)
    return execute(on_workers(vm, name, start), dry_run)


def launch(vm: TpuVm, name: str, trainer: Sequence[str], dry_run: bool) -> None:
    """Creates what is not there, waits, copies and trains, and again after each preemption.

    Raises:
        LaunchError: if training fails for good, or there are too many preemptions.
    """
    trainer_command("python", vm.runs, name, trainer, vm.env)  # a mistake in it is found before TPUs are paid for
    for preemption in range(vm.max_preemptions + 1):
        if preemption:
            print(f"{name} was preempted; {preemption} of at most {vm.max_preemptions}", file=sys.stderr)
        now = "NOT_FOUND" if dry_run else state(vm, name)
        if now in PREEMPTED:
            delete(vm, name, dry_run)
            now = "NOT_FOUND"
        if now == "NOT_FOUND":
            create(vm, name, dry_run)
        wait(vm, name, dry_run)
        if now == "NOT_FOUND" or "running" not in (output(on_workers(vm, name, worker("status"))) or ""):
            copy(vm, name, dry_run)
        if _train_until_preempted(vm, name, trainer, dry_run):
            return
    raise LaunchError(f"{name} was preempted {vm.max_preemptions + 1} times; launch again, or raise max_preemptions.")


def _train_until_preempted(vm: TpuVm, name: str, trainer: Sequence[str], dry_run: bool) -> bool:
    """Whether training is done; else the TPUs were taken away. TPUs that are there are never given up."""
    while train(vm, name, trainer, dry_run):
        if state(vm, name) != "ACTIVE":
            return False
        said = output(on_workers(vm, name, worker("status"))) or ""
        if ended := re.findall("exit code [1-9][0-9]*", said):
            raise LaunchError(
                f"Training ended before it was done, with {ended[0]}: see the log above, then launch again to go on, "
                "or give the TPUs back with the command delete."
            )
        print("The connection to the workers was lost; connecting again.", file=sys.stderr)
        time.sleep(POLL_SECONDS)
    if dry_run:
        print(f"# after each preemption, {vm.max_preemptions} times at most: what resume prints")
    else:
        print("Done; give the TPUs back with the command delete.")
    return True


def delete(vm: TpuVm, name: str, dry_run: bool) -> None:
    """Gives the TPUs back."""
    must(gcloud("delete", vm, name, "--force", "--quiet"), dry_run)


def run(argv: Sequence[str]) -> int:
    """Runs one of COMMANDS; the exit code."""
    flags, vm = parse("launch.tpu_vm", __doc__, TpuVm, COMMANDS, argv)
    name, dry_run = flags.name, flags.dry_run
    match flags.command:
        case "launch":
            launch(vm, name, flags.trainer, dry_run)
        case "resume":
            if not dry_run and (now := state(vm, name)) not in PREEMPTED:
                raise LaunchError(f"{name} is {now}, so there is nothing to resume; use the command launch.")
            trainer_command("python", vm.runs, name, flags.trainer, vm.env)  # a mistake in it deletes nothing
            delete(vm, name, dry_run)
            launch(vm, name, flags.trainer, dry_run)
        case "create":
            create(vm, name, dry_run)
        case "wait":
            wait(vm, name, dry_run)
        case "copy":
            copy(vm, name, dry_run)
        case "run":
            return min(train(vm, name, flags.trainer, dry_run), 1)
        case "stop":
            must(on_workers(vm, name, worker("stop")), dry_run)
        case "status":
            must(gcloud("describe", vm, name), dry_run)
        case "delete":
            delete(vm, name, dry_run)
    return 0


if __name__ == "__main__":
    main(run)
