"""The course of a launch on TPU VMs, with a Google Cloud that is made of lists."""

import json
import subprocess

import pytest

from launch import tpu_vm
from launch.cluster_file import LaunchError
from launch.command_line import CLONE


class Cloud:
    """Answers gcloud's and git's commands: states by `states`, the trainer by `trainings`, workers by `said`."""

    def __init__(self, states: list[str], trainings: list[int], said: str | None = None) -> None:
        self.states, self.trainings, self.said = states, trainings, said
        self.done: list[str] = []

    def run(self, command: list[str], **_) -> subprocess.CompletedProcess:
        code, text = 0, ""
        if command[0] == "git":
            verb = "archive" if "archive" in command else None
        else:
            verb = command[4]
            if verb == "list":
                verb = None
                state = self.states.pop(0)
                found = [] if state == "NOT_FOUND" else [{"name": "projects/p/r", "state": {"state": state}}]
                text = json.dumps([*found, {"name": "projects/p/r-2", "state": {"state": "FAILED"}}])
            elif verb == "ssh":
                verb = next(word for word in ("install", "run", "status", "stop") if f"worker.sh {word}" in command[-3])
                if verb == "run":
                    code = self.trainings.pop(0)
                elif verb == "status":
                    code, text, verb = (255, "", None) if self.said is None else (0, self.said, None)
        if verb:
            self.done.append(verb)
        return subprocess.CompletedProcess(command, code, stdout=text)


def launch(monkeypatch, cloud: Cloud, command="launch", preemptions=20, trainer=("--", "--config=c.py")) -> list[str]:
    monkeypatch.setattr(subprocess, "run", cloud.run)
    monkeypatch.setattr(tpu_vm, "POLL_SECONDS", 0)
    vm = tpu_vm.TpuVm("p", "z", "v5litepod-16", "v2-alpha-tpuv5-lite", "gs://bucket/runs", max_preemptions=preemptions)
    monkeypatch.setattr("launch.command_line.read", lambda *_: vm)
    trainer = trainer if command != "stop" else ()
    assert tpu_vm.run([command, f"--cluster={CLONE}", "--name=r", *trainer]) == 0
    return cloud.done


STEPS = ["create", "archive", "scp", "install", "run"]


def test_a_launch_waits_and_trains_to_the_end(monkeypatch):
    states = ["NOT_FOUND", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert launch(monkeypatch, Cloud(states, [0])) == STEPS


def test_a_preemption_is_resumed(monkeypatch):
    states = ["NOT_FOUND", "ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"]
    assert launch(monkeypatch, Cloud(states, [255, 0])) == [*STEPS, "delete", *STEPS]


def test_a_preemption_while_no_launcher_watched_is_resumed(monkeypatch):
    assert launch(monkeypatch, Cloud(["SUSPENDED", "ACTIVE"], [0])) == ["delete", *STEPS]
    assert launch(monkeypatch, Cloud(["SUSPENDED", "NOT_FOUND", "ACTIVE"], [0]), "resume") == ["delete", *STEPS]


def test_a_lost_connection_gives_up_nothing(monkeypatch):
    cloud = Cloud(["NOT_FOUND", "ACTIVE", "ACTIVE", "ACTIVE"], [255, 1, 0], said="running\nrunning\n")
    assert launch(monkeypatch, cloud) == [*STEPS, "run", "run"]


def test_workers_that_cannot_be_reached_yet_are_not_given_up(monkeypatch):
    cloud = Cloud(["NOT_FOUND", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], [255, 255, 0])
    assert launch(monkeypatch, cloud) == [*STEPS, "run", "delete", *STEPS]


def test_a_launch_joins_what_runs(monkeypatch):
    assert launch(monkeypatch, Cloud(["ACTIVE", "ACTIVE"], [0], said="running")) == ["run"]


def test_a_failure_of_the_trainer_is_final(monkeypatch):
    cloud = Cloud(["NOT_FOUND", "ACTIVE", "ACTIVE"], [1], said="running\nended with exit code 1\n")
    with pytest.raises(LaunchError, match="with exit code 1: "):
        launch(monkeypatch, cloud)
    assert cloud.done == STEPS


def test_what_fails_while_it_is_waited_for(monkeypatch):
    with pytest.raises(LaunchError, match="r is FAILED"):
        launch(monkeypatch, Cloud(["NOT_FOUND", "FAILED"], []))


def test_too_many_preemptions(monkeypatch):
    cloud = Cloud(["NOT_FOUND", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE", "SUSPENDED"], [255, 255])
    with pytest.raises(LaunchError, match="preempted 2 times"):
        launch(monkeypatch, cloud, preemptions=1)


def test_resume_gives_up_nothing_that_is_there(monkeypatch):
    cloud = Cloud(["ACTIVE"], [])
    with pytest.raises(LaunchError, match="nothing to resume"):
        launch(monkeypatch, cloud, "resume")
    assert cloud.done == []


def test_resume_without_a_config_deletes_nothing(monkeypatch):
    cloud = Cloud(["SUSPENDED"], [])
    with pytest.raises(LaunchError, match="config is missing"):
        launch(monkeypatch, cloud, "resume", trainer=())
    assert cloud.done == []


def test_a_stopped_run_is_no_preemption(monkeypatch):
    cloud = Cloud(["NOT_FOUND", "ACTIVE", "ACTIVE"], [42], said="ended with exit code 42\nended with exit code 42\n")
    with pytest.raises(LaunchError, match="with exit code 42: "):
        launch(monkeypatch, cloud)
    assert cloud.done == STEPS


def test_stop_asks_the_workers(monkeypatch):
    assert launch(monkeypatch, Cloud([], []), "stop") == ["stop"]
