"""`metrics.jsonl` has each step once, whatever was stopped, resumed and run again."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.training.metrics import MetricsLog, read_lines


def write(workdir, stage, resumed_at, steps, later=(), run=0):
    log = MetricsLog(workdir, stage, resumed_at, later)
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
    log = MetricsLog(tmp_path, "denoiser", 0, ())
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


def test_other_stages_are_kept_and_later_ones_dropped(tmp_path):
    write(tmp_path, "images", 0, [1, 2, 3])
    write(tmp_path, "video", 0, [1, 2, 3, 4])
    write(tmp_path, "denoiser", 0, [1, 2])
    write(tmp_path, "video", 2, [3], later=("denoiser",), run=1)
    assert [(row["stage"], row["step"], row["run"]) for row in rows(tmp_path)] == [
        *(("images", step, 0) for step in (1, 2, 3)),
        *(("video", step, 0) for step in (1, 2)),
        ("video", 3, 1),
    ]


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
    assert [row["step"] for _, row in read_lines(path)] == [1, 2, 3][:complete]
    write(workdir, "denoiser", 3, [4])
    assert [row["step"] for row in rows(workdir)] == [*[1, 2, 3][:complete], 4]


def test_lines_are_kept_as_they_are(tmp_path):
    write(tmp_path, "denoiser", 0, [1, 2])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, "denoiser", 2, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "".join(line for line, _ in read_lines(tmp_path / "metrics.jsonl")).encode() == before


def test_no_file_is_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
