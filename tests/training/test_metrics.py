"""`metrics.jsonl` has each step once, whatever was stopped, resumed and run again."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.training.metrics import MetricsLog, read_metrics


def write(workdir, stage, resumed_at, steps, run=0):
    log = MetricsLog(workdir, stage, resumed_at)
    for step in steps:
        log.write(step, {"loss": float(step), "run": run})
    log.close()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_stage_the_step_and_the_values(tmp_path):
    write(tmp_path, "denoiser", 0, [1])
    assert rows(tmp_path) == [{"stage": "denoiser", "step": 1, "loss": 1.0, "run": 0}]
    assert list((tmp_path / "tensorboard" / "denoiser").glob("events.*"))


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, "denoiser", 0)
    log.write(10, {"loss": 0.5})
    assert rows(tmp_path)[0]["step"] == 10
    log.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4))
def test_each_step_is_there_once_and_is_the_last_runs(tmp_path_factory, runs):
    """A run is stopped some steps after the checkpoint that the next one starts from."""
    workdir, twin, reached = tmp_path_factory.mktemp("run"), {}, 0
    for run, (done, lost) in enumerate(runs):
        start = max(0, reached - lost)
        twin = {step: which for step, which in twin.items() if step <= start}
        steps = range(start + 1, start + done + 1)
        write(workdir, "tokenizer", start, steps, run=run)
        twin |= dict.fromkeys(steps, run)
        reached = start + done
    assert [(row["step"], row["run"]) for row in rows(workdir)] == sorted(twin.items())


def test_other_stages_are_kept_until_they_are_removed(tmp_path):
    write(tmp_path, "images", 0, [1, 2, 3])
    write(tmp_path, "denoiser", 0, [1, 2])
    log = MetricsLog(tmp_path, "images", 2)
    assert [(row["stage"], row["step"]) for row in rows(tmp_path)] == [
        *(("images", step) for step in (1, 2)),
        *(("denoiser", step) for step in (1, 2)),
    ]
    removed = log.remove("denoiser")
    log.write(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in removed.splitlines()] == [1, 2]
    assert [(row["stage"], row["step"]) for row in rows(tmp_path)] == [("images", step) for step in (1, 2, 3)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60))
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path_factory, removed):
    """Wherever a killed process stopped writing, what was complete is kept and what follows can be read."""
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, "denoiser", 0, [1, 2, 3])
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-removed])
    complete = whole[:-removed].count(b"\n")
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3][:complete]
    write(workdir, "denoiser", 3, [4])
    assert [row["step"] for row in rows(workdir)] == [*[1, 2, 3][:complete], 4]


def test_lines_are_kept_as_they_are(tmp_path):
    write(tmp_path, "denoiser", 0, [1, 2])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, "denoiser", 2, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


GARBAGE = [
    b"garbage",
    b"\0\0\0",
    b"[1, 2]",
    b'{"step": 1}',
    b'{"stage": "denoiser"}',
    b"\xff\xfe",
    b"[" * 100_000,
    b"7",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_lines_that_are_no_metrics_are_skipped_with_a_warning(garbage, tmp_path, capsys):
    write(tmp_path, "denoiser", 0, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(garbage + b"\n" + path.read_bytes())
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert f"{path} has 1 lines that are no metrics (line 1)" in capsys.readouterr().err
    write(tmp_path, "denoiser", 1, [2])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
