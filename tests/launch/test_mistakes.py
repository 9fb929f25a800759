"""Mistakes in a cluster's file or on the command line are one sentence, exit code 1, and nothing runs."""

import re
import subprocess

import pytest

from launch import gke, gpu_host, slurm, tpu_vm
from launch.cluster_file import LaunchError
from launch.command_line import CLONE, main

LAUNCHERS = {"tpu_v5e": tpu_vm, "gke_v5e": gke, "xpk_v6e": gke, "slurm_h100": slurm, "gpu_host": gpu_host}


def launch(tmp_path, cluster: str, changes: dict[str, str | None], *arguments: str, name: str = "r") -> None:
    """Launches on an example's cluster with some keys changed, or left out for None."""
    with open(f"{CLONE}/launch/clusters/{cluster}.toml", encoding="utf-8") as file:
        lines = [line for line in file if line.partition(" = ")[0] not in changes]
    lines = [f"{key} = {value}\n" for key, value in changes.items() if value is not None] + lines
    path = tmp_path / "cluster.toml"
    path.write_text("".join(lines))
    trainer = arguments or ("--", "--config=c.py")
    LAUNCHERS[cluster].run(["launch", f"--cluster={path}", f"--name={name}", "--dry_run", *trainer])


@pytest.mark.parametrize(
    ("cluster", "changes", "sentence"),
    [
        ("tpu_v5e", {"zones": '"a"'}, "zones is no key of this kind of cluster; its keys are project, zone"),
        ("tpu_v5e", {"zone": None}, "zone is missing; add it"),
        ("tpu_v5e", {"zone": "3"}, "zone = 3 should be of type str"),
        ("tpu_v5e", {"spot": '"yes"'}, "spot = 'yes' should be of type bool"),
        ("tpu_v5e", {"slices": "true"}, "slices = True should be of type int"),
        ("tpu_v5e", {"slices": "0"}, "slices = 0 should be at least 1"),
        ("tpu_v5e", {"zone": '"a\\nb"'}, "unprintable characters"),
        ("tpu_v5e", {"zone": '""'}, "is empty"),
        ("tpu_v5e", {"reserved": "true"}, "spot and reserved exclude each other"),
        ("tpu_v5e", {"nfs": None}, "lost at a preemption; name gs://BUCKET/FOLDER"),
        ("tpu_v5e", {"runs": '"runs"'}, "the absolute path that it is mounted at"),
        ("tpu_v5e", {"accelerator_type": '"tpu7x-16"'}, "GKE only"),
        ("tpu_v5e", {"project": "nonsense"}, "is not TOML"),
        ("gke_v5e", {"topology": '"4x4x4"'}, "topology = '4x4x4' of tpu-v5-lite-podslice should look like 4x4"),
        ("gke_v5e", {"topology": '"4xq"'}, "should look like 4x4"),
        ("gke_v5e", {"topology": '"1x1"'}, "divide the 1 chips"),
        ("gke_v5e", {"accelerator": '"v5e"'}, "should be one of tpu-v4-podslice"),
        ("gke_v5e", {"volume_claim": None}, "lost with them; name gs://BUCKET/FOLDER"),
        ("gke_v5e", {"max_restarts": "-1"}, "not negative"),
        ("xpk_v6e", {"volume_claim": '"runs"', "runs": '"/runs"'}, "XPK mounts no volume_claim"),
        ("slurm_h100", {"runs": '"runs"'}, "should be an absolute path"),
        ("slurm_h100", {"nodes": "0"}, "should be at least 1"),
        ("slurm_h100", {"grace_seconds": "0"}, "grace_seconds 1 to 65535"),
        ("slurm_h100", {"env": '{"A B" = "c"}', "[env]": None, "JAX_COMPILATION_CACHE_DIR": None}, "no name of an"),
        ("gpu_host", {"env": "{A = 1}", "[env]": None, "XLA_PYTHON_CLIENT_MEM_FRACTION": None}, "strings only"),
        ("gpu_host", {"max_restarts": "-1"}, "should not be negative"),
    ],
)
def test_clusters(tmp_path, cluster, changes, sentence):
    changes = {f"{key}\n" if key == "[env]" else key: value for key, value in changes.items()}
    with pytest.raises(LaunchError, match=re.escape(sentence)) as error:
        launch(tmp_path, cluster, changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--"], "end the command with -- --config=configs/NAME.py"),
        (["--", "--mode=train"], "end the command with -- --config"),
        (["--", "--config=c.py", "--workdir=a"], "Leave --workdir out"),
        (["--", "--config=c.py", "--num_processes=2"], "Leave --num_processes out"),
        (["--zones=a", "--", "--config=c.py"], "unrecognized arguments: --zones=a"),
    ],
)
def test_arguments(tmp_path, arguments, sentence):
    with pytest.raises(LaunchError, match=re.escape(sentence)):
        launch(tmp_path, "tpu_v5e", {}, *arguments)


@pytest.mark.parametrize("name", ["Walt", "a b", "-a", "a-", "--project=x", "1a", "a" * 41, "a;b", ""])
def test_names(tmp_path, name):
    with pytest.raises(LaunchError, match="small letters, digits and hyphens"):
        launch(tmp_path, "gke_v5e", {}, name=name)


def test_arguments_that_a_command_does_not_read():
    cluster = f"--cluster={CLONE}/launch/clusters/gke_v5e.toml"
    with pytest.raises(LaunchError, match="trains nothing"):
        gke.run(["delete", cluster, "--name=r", "--dry_run", "--", "--config=c.py"])


def test_a_mistake_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gke", "launch", "--cluster=/no/file.toml", "--name=r"])
    with pytest.raises(SystemExit) as exit:
        main(gke.run)
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith("error: --cluster=/no/file.toml can't be read")


def test_missing_programs_and_failed_commands(tmp_path, monkeypatch):
    argv = ["status", f"--cluster={CLONE}/launch/clusters/tpu_v5e.toml", "--name=r"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="gcloud is not installed"):
        tpu_vm.run(argv)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 7))
    with pytest.raises(LaunchError, match="failed with exit code 7"):
        tpu_vm.run(argv)
