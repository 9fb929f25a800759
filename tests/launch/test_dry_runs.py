"""Dry runs print what they should, run nothing, and quote everything."""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest

from launch.command_line import CLONE

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
_spec = importlib.util.spec_from_file_location("make_launch", GOLDEN / "make_launch.py")
make_launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_launch)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    def refuse(command, **_):
        raise AssertionError(f"a dry run ran {command}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.parametrize("cluster", make_launch.CLUSTERS)
def test_dry_runs_equal_the_goldens(cluster):
    expected = (GOLDEN / "launch" / f"{cluster}.txt").read_text(encoding="utf-8")
    assert make_launch.dry_runs(cluster) == expected


def test_every_example_has_a_golden():
    examples = {path.stem for path in (pathlib.Path(CLONE) / "launch" / "clusters").iterdir()}
    assert examples == set(make_launch.CLUSTERS)


def trainers_of(text: str) -> list[list[str]]:
    """Commands of the trainer in what a dry run prints, read as the shells on the way to it would."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        words = next(
            (shlex.split(word.partition("=")[2]) for word in words if word.startswith("--command=")),
            words,
        )
        if "walt_jax.main" in words:
            found.append(words[words.index("walt_jax.main") + 1 :])
    return found


@pytest.mark.parametrize("cluster", ["tpu_v5e", "xpk_v6e", "slurm_h100", "gpu_host"])
@pytest.mark.parametrize(
    "hostile", ["a b", "'; reboot #", '"$(reboot)"', "`reboot`", "&& reboot", "\\", "*", "--x=$HOME"]
)
def test_shells_read_the_trainers_arguments_as_they_were_given(cluster, hostile):
    argument = f"--config.data.source={hostile}"
    text = make_launch.dry_run(cluster, "launch", ["--", "--config=configs/walt_l.py", argument])
    [trainer] = trainers_of(text)
    assert trainer[1:] == ["--config=configs/walt_l.py", argument]


def jobset(cluster: str) -> dict:
    text = make_launch.dry_run(cluster, "launch")
    return json.loads(re.search(r"<<'END'\n(.*)\nEND", text, re.DOTALL)[1])


@pytest.mark.parametrize(("cluster", "hosts", "slices"), [("gke_v5e", 4, 1), ("gke_v5p_2_slices", 16, 2)])
def test_manifests_obey_jobsets_schema(cluster, hosts, slices):
    document = jobset(cluster)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    [replicated] = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    # Kubernetes expands $(NAME) in commands, and $$( is its escape.
    [container] = job["template"]["spec"]["containers"]
    assert "--config.data.source=/data/my clips; $$(reboot)" in container["command"]


def test_the_schema_refuses_what_jobset_would_refuse():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    document = jobset("gke_v5e")
    for change in (
        lambda spec: spec.update(replicatedJob=spec.pop("replicatedJobs")),
        lambda spec: spec["failurePolicy"].update(restartStrategy="Restart"),
        lambda spec: spec["failurePolicy"].update(maxRestarts="100"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].pop("containers"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(parallelism=0.5),
    ):
        changed = json.loads(json.dumps(document))
        change(changed["spec"])
        assert not validator.is_valid(changed)


def test_user_mistakes_are_final_and_preemptions_are_not():
    [rule] = jobset("gke_v5e")["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [42, *range(127, 256)]


def test_launchers_import_neither_jax_nor_walt_jax():
    source = "\n".join(path.read_text() for path in (pathlib.Path(CLONE) / "launch").glob("*.py"))
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported - {"launch"} <= sys.stdlib_module_names


def linted(program: str, *arguments: object) -> subprocess.CompletedProcess:
    path = shutil.which(program, path=str(pathlib.Path(sys.executable).parent)) or program
    return subprocess.run([path, *arguments], capture_output=True, text=True)


def test_shell_scripts_pass_shellcheck(monkeypatch, tmp_path):
    monkeypatch.undo()
    scripts = sorted((pathlib.Path(CLONE) / "launch").glob("*.sh"))
    assert len(scripts) == 2
    done = linted("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout
    (tmp_path / "unquoted.sh").write_text("#!/bin/bash\nrm -r $1\n")
    assert linted("shellcheck", tmp_path / "unquoted.sh").returncode == 1


def test_the_dockerfile_passes_hadolint(monkeypatch):
    monkeypatch.undo()
    done = linted("hadolint", pathlib.Path(CLONE) / "Dockerfile")
    assert done.returncode == 0, done.stdout
