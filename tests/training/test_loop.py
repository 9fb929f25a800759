"""A stage's loop: batches made ahead are the same ones, signals save a step, later stages are set aside."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from walt_jax.data.packing import Item, Packed
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError
from walt_jax.evaluation.report_previews import steps_of
from walt_jax.parallel.mesh import MeshConfig, make_mesh
from walt_jax.training import loop, preview
from walt_jax.training.loop import StageConfig, made_ahead, run_stage
from walt_jax.training.optimizer import OptimizerConfig
from walt_jax.training.preview import PREVIEW
from walt_jax.training.stopping import Stopped


class Items:
    """Clips of 1 to 7 tokens; one of them may be bad."""

    def __init__(self, bad: int = -1):
        self.bad = bad

    def __getitem__(self, number: int) -> Item:
        if number == self.bad:
            raise UserError("a sentence")
        return Item(number, number % 7 + 1, number)


def packs(items: Items) -> Packed:
    return Packed(items, batch_size=2, tokens=12, clips=4, buffer=8)


@pytest.mark.parametrize("taken", range(5))
def test_a_batch_that_was_made_and_not_taken_is_not_lost(taken):
    in_turn = list(itertools.islice(packs(Items()), taken + 6))
    with contextlib.closing(made_ahead(packs(Items()), None)) as iterator:
        batches = [next(iterator) for _ in range(taken)]
        position = json.loads(json.dumps(iterator.get_state()))
    with contextlib.closing(made_ahead(packs(Items()), position)) as iterator:
        batches += [next(iterator) for _ in range(6)]
    assert batches == in_turn


def test_a_mistake_is_told_where_its_batch_is_asked_for():
    with contextlib.closing(made_ahead(packs(Items(bad=30)), None)) as iterator:
        next(iterator)
        with pytest.raises(UserError) as raised:
            list(iterator)
    assert str(raised.value) == "a sentence"


def test_no_thread_stays():
    before = set(threading.enumerate())
    with contextlib.closing(made_ahead(packs(Items()), None)) as iterator:
        next(iterator)
        started = set(threading.enumerate()) - before
    assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


class Square:
    """A task of one parameter: its distance from the batch's mean, with noise."""

    def init(self, key):
        return {"w": jax.random.normal(key, (3,))}, {}

    def gradients(self, params, moving, frozen, batch, key, step):
        noise = jax.random.normal(key, (3,))
        difference = params["w"] - batch["x"].mean() + 0.1 * noise
        return {"w": difference}, moving, {"loss": jnp.square(difference).sum()}

    def tokens(self, batch):
        return 3 * len(batch["x"])

    def served(self, params, moving):
        return params

    def start(self, params, moving, served):
        return served, moving


class Numbers(grain.IterDataset):
    """Batches of one number each, counted; sends a signal to this process when it makes the `at`-th."""

    def __init__(self, at: int = 0, number: int = 0):
        super().__init__()
        self._at, self._number = at, number

    def __iter__(self):
        return NumbersIterator(self._at, self._number)


class NumbersIterator(grain.DatasetIterator):
    def __init__(self, at, number):
        super().__init__()
        self._count, self._at, self._number = 0, at, number

    def __next__(self):
        self._count += 1
        if self._count == self._at:
            os.kill(os.getpid(), self._number)
        return {"x": np.full((2,), self._count, np.float32)}

    def get_state(self):
        return {"count": self._count}

    def set_state(self, state):
        self._count = state["count"]


MESH = make_mesh(MeshConfig(), jax.devices())
STAGE = StageConfig(
    task="tokenizer",
    steps=30,
    batch_size=2,
    optimizer=OptimizerConfig(name="adamw", learning_rate=0.1, warmup_steps=1),
    checkpoint_every=12,
    log_every=1,
)


def train(workdir, dataset=None, later=(), stage=STAGE, **extras):
    key = jax.random.key(0)
    return run_stage(
        "first", stage, Square(), lambda: dataset or Numbers(), workdir, key, MESH, later_stages=later, **extras
    )


def losses(workdir) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], repr(row["loss"])) for row in rows if row["stage"] == "first"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(workdir)
    return workdir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_step_and_the_run_goes_on_from_there(undisturbed, tmp_path, number):
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, Numbers(at=20, number=number))
    assert stopped.value.signal == number
    saved = max(int(path.name) for path in (tmp_path / "checkpoints" / "first").iterdir() if path.name.isdigit())
    assert stopped.value.saved.startswith(f"step {saved} of first is saved:")
    assert saved not in (12, 24)  # no step that is saved in any case
    trained = train(tmp_path)
    np.testing.assert_array_equal(trained.served["w"], train(undisturbed).served["w"])
    assert losses(tmp_path) == losses(undisturbed)


def test_the_learning_rate_of_each_step_is_logged(undisturbed):
    """A step of warmup, then a half cosine."""
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    expected = [0.0, *(0.05 * (1 + math.cos(math.pi * done / 29)) for done in range(29))]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], expected, atol=1e-7)


def test_the_best_checkpoints_are_kept(tmp_path):
    """By the mean over the steps since the checkpoint before; the loss grows, so that the first has the least."""
    stage = dataclasses.replace(STAGE, checkpoint_every=10, keep_last=1, keep_best=1)
    train(tmp_path, stage=stage)
    assert {path.name for path in (tmp_path / "checkpoints" / "first").iterdir()} == {"10", "30"}
    with pytest.raises(
        UserError, match=r"keep_metric is 'psnr', which the stage does not measure; choose one of .*loss"
    ):
        train(tmp_path / "other", stage=dataclasses.replace(stage, keep_metric="+psnr"))


def test_unseen_clips_are_measured_and_the_best_checkpoints_are_kept_by_them(tmp_path):
    """The measure is best at step 20, which is a checkpoint, though not one of every 8 steps."""
    measured = []

    def validation():
        def validate(served):
            measured.append(np.asarray(served["w"]))
            return {"validation_x": 4.0 if len(measured) == 4 else 1.0}, {"validation_x": "how"}

        return validate

    stage = dataclasses.replace(STAGE, checkpoint_every=10, keep_last=1, keep_best=1, validate_every=8)
    stage = dataclasses.replace(stage, keep_metric="+validation_x")
    with pytest.raises(ValueError, match="which is measured with validate_every: set that"):
        dataclasses.replace(stage, validate_every=0)
    trained = train(tmp_path, stage=stage, validation=validation)
    assert {path.name for path in (tmp_path / "checkpoints" / "first").iterdir()} == {"20", "30"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["validation_x"] for row in rows if "validation_x" in row}
    assert found == {8: 1.0, 10: 1.0, 16: 1.0, 20: 4.0, 24: 1.0, 30: 1.0}
    assert all(row["validation_protocols"] == {"validation_x": "how"} for row in rows if "validation_x" in row)
    np.testing.assert_array_equal(measured[-1], trained.served["w"])
    with pytest.raises(UserError, match=r"keep_metric is 'validation_y', which is not measured; choose one of valida"):
        train(tmp_path / "b", stage=dataclasses.replace(stage, keep_metric="validation_y"), validation=validation)


def test_what_another_run_lacks_starts_afresh(undisturbed, tmp_path):
    train(tmp_path, initial={})
    assert losses(tmp_path) == losses(undisturbed)
    train(tmp_path / "other", initial={"w": jnp.zeros(3)})
    assert losses(tmp_path / "other") != losses(undisturbed)


def test_a_signal_while_the_end_is_measured_stops_the_run(undisturbed, tmp_path):
    """The last step is saved, and nothing that comes after this stage begins."""
    with pytest.raises(Stopped, match="step 30 of first is saved"):
        train(tmp_path, finish=lambda served: os.kill(os.getpid(), signal.SIGTERM) or {"measured": 1})
    trained = train(tmp_path, dataset=None)
    assert trained.outcome == {"measured": 1} and losses(tmp_path) == losses(undisturbed)


def test_a_signal_while_clips_are_encoded_stops_at_once(tmp_path):
    class Encoding(Numbers):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            raise AssertionError("it went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, Encoding())
    finally:
        signal.signal(signal.SIGINT, before)


def test_previews_are_renewed_and_change_nothing(undisturbed, tmp_path, monkeypatch):
    """After 1/8, 1/4 and 1/2 of 16 steps, and then each 16: a sheet of what is served then."""
    stage = dataclasses.replace(STAGE, preview_every=16)
    shown, written = [], []

    def sheet(served):
        shown.append(float(served["w"][0]))
        clip = np.full((2, 16, 16, 3), len(shown), np.uint8)
        return preview.Shown(Image.new("RGB", (len(shown), 1)), [[clip] * 3, [clip] * 2], ["a", "b"], "clips", 8.0)

    write = preview.write_preview
    size = lambda: Image.open(tmp_path / PREVIEW).size  # noqa: E731
    monkeypatch.setattr(loop, "write_preview", lambda *a: (write(*a), written.append(size())))
    trained = train(tmp_path, stage=stage, preview=lambda: sheet)
    np.testing.assert_array_equal(trained.served["w"], train(undisturbed).served["w"])
    assert written == [(1, 1), (2, 1), (3, 1), (4, 1)] and len(set(shown)) == 4
    videos = tmp_path / "previews" / "first"
    assert steps_of(videos) == [2, 4, 8, 16]
    assert read_clip(videos / "2.mp4").shape == (2, 34, 52, 3)
    assert [step for step in range(1, 50) if preview.due(step, 16)] == [2, 4, 8, 16, 32, 48]
    assert [step for step in range(1, 25) if preview.due(step, 12)] == [3, 6, 12, 24]  # 1.5 is no step


def test_videos_of_steps_are_spread_and_later_ones_go(tmp_path):
    assert preview.kept([1, 2, 4, 8, 16, 24, 32], 4) == [1, 16, 24, 32]
    clips = np.arange(4, dtype=np.uint8)[:, None, None, None, None].repeat(2 * 4 * 4 * 3).reshape(4, 2, 4, 4, 3)
    whole = preview.tiled([clips[:2], clips[2:]])
    assert whole.shape == (2, 10, 10, 3) and (whole[:, 4:6] == 255).all() and (whole[:, :, 4:6] == 255).all()
    for number, corner in enumerate((whole[:, :4, :4], whole[:, :4, 6:], whole[:, 6:, :4], whole[:, 6:, 6:])):
        np.testing.assert_array_equal(corner, clips[number])
    shown = preview.Shown(Image.new("RGB", (1, 1)), [clips], [], "clips", 8.0)
    for step in (5, 10, 15, 10):  # the last is of a run that goes on from an earlier step
        preview.write_preview(tmp_path, "s", step, shown)
    assert steps_of(tmp_path / "previews" / "s") == [5, 10]


def test_what_later_stages_left_is_set_aside_once_a_step_is_saved(undisturbed, tmp_path):
    """The newest checkpoint is damaged: its steps are done again, and nothing is lost meanwhile."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    (workdir / "checkpoints" / "second" / "10").mkdir(parents=True)
    line = json.dumps({"stage": "second", "step": 10, "loss": 1.0}) + "\n"
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(line)
    train(workdir, later=("second",))  # all is well: nothing is to be done
    assert (workdir / "checkpoints" / "second" / "10").is_dir()
    for file in (workdir / "checkpoints" / "first" / "30").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")

    class Broken(Numbers):
        def __iter__(self):
            raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        train(workdir, Broken(), later=("second",))
    assert (workdir / "checkpoints" / "second" / "10").is_dir()
    assert (workdir / "metrics.jsonl").read_text().endswith(line)
    trained = train(workdir, later=("second",))
    np.testing.assert_array_equal(trained.served["w"], train(undisturbed).served["w"])
    folders = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert folders == {"first", "second.set-aside"}
    assert (workdir / "checkpoints" / "second.set-aside" / "10").is_dir()
    assert (workdir / "checkpoints" / "second.set-aside" / "metrics.jsonl").read_text() == line
    assert losses(workdir) == losses(undisturbed)


def test_files_that_vanish_are_logged_and_a_warning_comes_when_there_are_more(undisturbed, tmp_path, capsys):
    calls = itertools.count()

    def gone():
        step = next(calls) + 1
        return ["a.mp4"] * (step > 9) + ["b.mp4"] * (step > 19)

    train(tmp_path, gone=gone)
    assert losses(tmp_path) == losses(undisturbed)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("files_gone", 0) for row in rows] == [0] * 9 + [1] * 10 + [2] * 11
    assert [row["step"] for row in rows if "warnings" in row] == [10, 20]
    warned = [line for line in capsys.readouterr().err.splitlines() if "vanished" in line]
    assert [line.split(": ", 1)[1] for line in warned] == [
        "Step 10 of first: 1 files have vanished and are skipped, the last being a.mp4.",
        "Step 20 of first: 2 files have vanished and are skipped, the last being b.mp4.",
    ]


def test_a_trace_of_some_steps_is_written_and_changes_nothing(undisturbed, tmp_path):
    train(tmp_path, profile=(3, 4))
    assert losses(tmp_path) == losses(undisturbed)
    assert len(list((tmp_path / "profile" / "first").glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_the_step_is_compiled_once(undisturbed):
    """Whatever the state's arrays come from, initialisation or the step before, they are the same kind to the step."""
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert not any("warnings" in row for row in rows)
    # Steps that a compilation or a checkpoint has held up have no rates.
    assert [row["step"] for row in rows if "step_seconds" not in row] == [1, 13, 25]
