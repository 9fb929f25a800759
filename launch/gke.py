"""Trains on TPU slices of a GKE cluster: a JobSet of one Job a slice and one pod a host, by kubectl or by XPK.

python -m launch.gke launch --cluster=launch/clusters/gke_v5e.toml --name=NAME -- --config=configs/NAME.py
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from launch.command_line import CLONE, execute, main, manifest, must, parse, trainer_command
from launch.restart import RESTARTED

DIMENSIONS = {  # of the topologies of each accelerator
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
    "tpu7x": 3,
}
CONTAINER = "trainer"


@dataclasses.dataclass(frozen=True)
class Gke:
    """Node pools of TPU slices; its TOML file has these keys.

    Args:
        project: the Google Cloud project.
        location: the cluster's zone or region.
        cluster: its name.
        accelerator: the node pools' label cloud.google.com/gke-tpu-accelerator.
        topology: of one slice, in chips, such as 4x4 or 4x4x8.
        image: the container image, with a tag; the command build makes it.
        runs: where runs are kept, each in a folder named after it: gs://BUCKET/FOLDER, or the path that every pod
            mounts `volume_claim` at.
        volume_claim: a PersistentVolumeClaim that many pods may write, such as Filestore's.
        chips_per_host: 4, or 1 or 8 of v5e and v6e on one host.
        slices: how many slices, connected over the data center's network.
        spot: node pools of preemptible capacity.
        namespace: the JobSet's.
        service_account: the pods' Kubernetes service account, which may read and write `runs`.
        privileged: pods run as root with all devices; without, the image's user needs access to the TPUs.
        grace_seconds: between SIGTERM and SIGKILL: time to save.
        max_restarts: of the JobSet, after preemptions and exit codes 42 and 127 to 255.
        keep_seconds: how long a finished JobSet is kept, with its logs.
        xpk_tpu_type: with it `launch` and `delete` go through XPK, and this is its --tpu-type, such as v5litepod-16.
        env: environment variables of the trainer.
    """

    project: str
    location: str
    cluster: str
    accelerator: str
    topology: str
    image: str
    runs: str
    volume_claim: str | None = None
    chips_per_host: int = 4
    slices: int = 1
    spot: bool = False
    namespace: str = "default"
    service_account: str | None = None
    privileged: bool = True
    grace_seconds: int = 300
    max_restarts: int = 100
    keep_seconds: int = 86400
    xpk_tpu_type: str | None = None
    env: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accelerator not in DIMENSIONS:
            raise ValueError(f"accelerator = {self.accelerator!r} should be one of {', '.join(DIMENSIONS)}.")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", self.topology) or len(self.sizes) != DIMENSIONS[self.accelerator]:
            form = "x".join("4" * DIMENSIONS[self.accelerator])
            raise ValueError(f"topology = {self.topology!r} of {self.accelerator} should look like {form}.")
        if self.chips_per_host not in (1, 4, 8) or self.chips % self.chips_per_host:
            raise ValueError(
                f"chips_per_host = {self.chips_per_host} should be 1, 4 or 8 and divide the {self.chips} chips of "
                f"topology {self.topology}."
            )
        if self.slices < 1 or min(self.grace_seconds, self.max_restarts, self.keep_seconds) < 0:
            raise ValueError("slices should be at least 1; grace_seconds, max_restarts and keep_seconds not negative.")
        if self.volume_claim is None and not self.runs.startswith("gs://"):
            raise ValueError(
                f"runs = {self.runs!r} would be in the pods' own files, which are lost with them; name "
                "gs://BUCKET/FOLDER, or what is mounted there: volume_claim = 'NAME'."
            )
        if self.volume_claim is not None and not self.runs.startswith("/"):
            raise ValueError("with a volume_claim, runs should be the absolute path that it is mounted at.")
        if self.volume_claim is not None and self.xpk_tpu_type is not None:
            raise ValueError("XPK mounts no volume_claim; leave xpk_tpu_type out, or name runs = 'gs://BUCKET/FOLDER'.")

    @property
    def sizes(self) -> list[int]:
        """The topology's."""
        return [int(size) for size in self.topology.split("x")]

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.sizes)


COMMANDS = {
    "build": "builds the image from the clone's Dockerfile and pushes it",
    "launch": "trains, or resumes where the run stopped; returns at once",
    "status": "the JobSet: restarts, and whether it is done",
    "logs": "follows the log of process 0",
    "delete": "deletes the JobSet; its trainer saves first",
}


def pod(gke: Gke, command: Sequence[str]) -> dict[str, Any]:
    """The pod's specification: one host, all of its chips."""
    # Kubernetes would expand $(NAME) in a command.
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": gke.image,
        "command": [argument.replace("$(", "$$(") for argument in command],
        "env": [{"name": key, "value": value.replace("$(", "$$(")} for key, value in gke.env.items()],
        "resources": {"limits": {"google.com/tpu": gke.chips_per_host}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if gke.privileged:
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": gke.grace_seconds,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": gke.accelerator,
            "cloud.google.com/gke-tpu-topology": gke.topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        # Processes that decode data share memory, and a container's 64 MB are too few.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if gke.spot:
        spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    if gke.service_account is not None:
        spec["serviceAccountName"] = gke.service_account
    if gke.volume_claim is not None:
        spec["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": gke.volume_claim}})
        container["volumeMounts"].append({"name": "runs", "mountPath": gke.runs})
    return spec


def jobset(gke: Gke, name: str, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet of a run. Exit codes that are no preemption or crash are final; after others all pods start again."""
    hosts = gke.chips // gke.chips_per_host
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": sorted(RESTARTED)},
                }
            ]
        },
        "template": {"spec": pod(gke, command)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": gke.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": gke.keep_seconds,
            "failurePolicy": {
                "maxRestarts": gke.max_restarts,
                # The old pods are gone before new ones start, so that never two trainers write one run.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": gke.slices, "template": {"spec": job}}],
        },
    }


def kubectl(gke: Gke, *arguments: str) -> list[str]:
    """A kubectl command on this cluster, whichever is the current one."""
    context = f"gke_{gke.project}_{gke.location}_{gke.cluster}"
    return ["kubectl", f"--context={context}", f"--namespace={gke.namespace}", *arguments]


def xpk(gke: Gke, verb: str, name: str, *arguments: str) -> list[str]:
    """An XPK command on a workload of this cluster."""
    place = [f"--cluster={gke.cluster}", f"--project={gke.project}", f"--zone={gke.location}"]
    return ["xpk", "workload", verb, f"--workload={name}", *place, *arguments]


def launch(gke: Gke, name: str, trainer: Sequence[str], dry_run: bool) -> None:
    """Submits the run; an older JobSet of this name has to be deleted first."""
    if gke.xpk_tpu_type is not None:
        command = trainer_command("python", gke.runs, name, trainer, gke.env)
        more = {
            "--tpu-type": gke.xpk_tpu_type,
            "--num-slices": gke.slices,
            "--docker-image": gke.image,
            "--max-restarts": gke.max_restarts,
            "--termination-grace-period-seconds": gke.grace_seconds,
            "--ttl-seconds-after-finished": gke.keep_seconds,
            "--command": shlex.join(command),
        }
        must(xpk(gke, "create", name, *(f"{flag}={value}" for flag, value in more.items())), dry_run)
        return
    command = trainer_command("python", gke.runs, name, trainer, {})
    place = [f"--project={gke.project}", f"--location={gke.location}"]
    must(["gcloud", "container", "clusters", "get-credentials", gke.cluster, *place], dry_run)
    must(kubectl(gke, "create", "--filename=-"), dry_run, stdin=manifest(jobset(gke, name, command)))


def run(argv: Sequence[str]) -> int:
    """Runs one of COMMANDS; the exit code."""
    flags, gke = parse("launch.gke", __doc__, Gke, COMMANDS, argv)
    name, dry_run = flags.name, flags.dry_run
    match flags.command:
        case "build":
            must(["docker", "build", "--build-arg=EXTRA=tpu", f"--tag={gke.image}", CLONE], dry_run)
            must(["docker", "push", gke.image], dry_run)
        case "launch":
            launch(gke, name, flags.trainer, dry_run)
        case "status":
            return min(execute(kubectl(gke, "get", "jobset", name, "--output=yaml"), dry_run), 1)
        case "logs":
            return min(execute(kubectl(gke, "logs", "--follow", f"job/{name}-slice-0"), dry_run), 1)
        case "delete":
            if gke.xpk_tpu_type is not None:
                must(xpk(gke, "delete", name), dry_run)
            else:
                must(kubectl(gke, "delete", "jobset", name, "--wait"), dry_run)
    return 0


if __name__ == "__main__":
    main(run)
