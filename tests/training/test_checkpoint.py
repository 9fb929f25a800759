"""What was saved comes back; a checkpoint that is damaged, wherever, is one sentence, and the one before is left."""

import gc
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.parallel import processes
from walt_jax.training.checkpoint import Checkpoints, Keep
from walt_jax.training.state import TrainState

POSITION, OUTCOME = {"waiting": [3, 1, 4]}, {"latent_mean": [0.5]}


def state(step):
    weights = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(weights)}, {}, {"w": jnp.asarray(2 * weights)}, {})


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(directory, writer=True)
    for step in (1, 2, 3):
        checkpoints.save(state(step), POSITION, OUTCOME)
    checkpoints.close()
    return directory


def test_the_newest_comes_back_and_one_before_is_kept(saved):
    checkpoints = Checkpoints(saved, writer=False)
    restored, position, outcome = checkpoints.restore(state(0))
    assert equal(restored, state(3)) and (position, outcome) == (POSITION, OUTCOME)
    assert equal(checkpoints.restore_part("ema", state(0).ema)[0], state(3).ema)
    assert {path.name for path in saved.iterdir() if path.is_dir()} == {"2", "3"}


def kept(directory, keep, scores) -> set[int]:
    """The steps that stay of those saved with these scores, in two processes: what is kept is known from the disk."""
    for steps in (range(1, 3), range(3, len(scores) + 1)):
        checkpoints = Checkpoints(directory, writer=True, keep=keep)
        for step in steps:
            checkpoints.save(state(step), POSITION, OUTCOME, scores[step - 1])
        checkpoints.close()
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit()}


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = [1.0, 5.0, 3.0, 4.0, 2.0]
    assert kept(tmp_path / "last", Keep(last=3), scores) == {3, 4, 5}
    assert kept(tmp_path / "best", Keep(last=1, best=2), scores) == {2, 4, 5}
    reader = Checkpoints(tmp_path / "best", writer=False)
    assert equal(reader.restore(state(0))[0], state(5))


def test_by_age_some_are_kept(tmp_path):
    assert kept(tmp_path / "hours", Keep(last=1, every_hours=0.5), [0.0] * 4) == {1, 4}
    assert kept(tmp_path / "all", Keep(last=1, every_hours=1e-12), [0.0] * 3) == {1, 2, 3}


def test_without_an_average_the_weights_are_kept_once(tmp_path):
    like, plain = state(0).replace(ema=None), state(5).replace(ema=None)
    checkpoints = Checkpoints(tmp_path, writer=True)
    checkpoints.save(plain, POSITION, OUTCOME)
    checkpoints.wait()
    assert {path.name for path in (tmp_path / "5").iterdir() if path.is_dir()} == {
        "weights",
        "state",
        "data",
        "outcome",
    }
    assert equal(checkpoints.restore(like)[0], plain)
    weights, outcome = checkpoints.restore_part("weights", {"params": like.params, "moving": like.moving})
    checkpoints.close()
    assert equal(weights, {"params": plain.params, "moving": {}}) and outcome == OUTCOME


def test_another_shape_is_told(saved):
    like = TrainState(jnp.int32(0), {"w": jnp.zeros((64, 65))}, {}, {"w": jnp.zeros((64, 65))}, {})
    with pytest.raises(UserError, match="is damaged or of another config"):
        Checkpoints(saved, writer=False).restore(like)


def flipped(content: bytes) -> bytes:
    """With one bit in the middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "else": lambda path: path.write_bytes(b"<html>" * 100),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_readers_change_nothing(saved, tmp_path):
    """A checkpoint that another process is writing has a folder with a temporary name."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.copytree(copy / "3", copy / "4.orbax-checkpoint-tmp-17")
    before = contents(copy)
    checkpoints = Checkpoints(copy, writer=False)
    assert checkpoints.steps() == [2, 3]
    assert equal(checkpoints.restore_part("ema", state(0).ema)[0], state(3).ema)
    checkpoints.close()
    assert contents(copy) == before
    nowhere = Checkpoints(tmp_path / "nowhere", writer=False)
    assert nowhere.steps() == [] and not (tmp_path / "nowhere").exists()


def test_a_damaged_checkpoint_is_passed_over_and_renamed_once_another_is_saved(saved, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    for file in (copy / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    checkpoints = Checkpoints(copy, writer=True)
    restored, _, _ = checkpoints.restore(state(0))
    assert equal(restored, state(2))
    assert f"the checkpoint {copy / '3'} is damaged" in capsys.readouterr().err
    assert (copy / "3").exists()
    checkpoints.save(state(3), POSITION, OUTCOME)
    checkpoints.close()
    assert (copy / "3.damaged" / "state").is_dir()
    assert equal(Checkpoints(copy, writer=False).restore(state(0))[0], state(3))


def test_where_all_are_damaged_nothing_is_removed(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    for file in copy.rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(b"")
    before = contents(copy)
    checkpoints = Checkpoints(copy, writer=True)
    with pytest.raises(UserError, match=r"3 is damaged or of another config .*, and 1 before it; .* rename"):
        checkpoints.restore(state(0))
    checkpoints.close()
    assert contents(copy) == before


def test_a_full_disk_and_a_lost_permission_are_sentences_and_the_last_checkpoint_stays(saved):
    """In a process whose files may not grow beyond a limit, and which then may not write to the folder."""
    with tempfile.TemporaryDirectory() as folder:  # where a user without rights may look
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(saved, copy)
        script = f"""
import os, pathlib, resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_checkpoint import state, Checkpoints, POSITION, OUTCOME, UserError
copy = pathlib.Path({str(copy)!r})
def attempt(step):
    try:
        checkpoints.save(state(step), POSITION, OUTCOME)
        checkpoints.close()
        print("it was saved")
    except UserError as error:
        print(error)
checkpoints = Checkpoints(copy, writer=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # what is too large is an OSError then
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
attempt(4)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
checkpoints = Checkpoints(copy, writer=True)
copy.parent.chmod(0o755)
copy.chmod(0o555)
if os.getuid() == 0:
    os.setuid(65534)
attempt(5)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        copy.chmod(0o755)
        full, lost = done.stdout.splitlines()
        for sentence, remedy in ((full, "free some space"), (lost, "make it writable")):
            assert re.search(
                rf"^A checkpoint can't be written to .*; the checkpoint of step 3 is complete: {remedy}", sentence
            )
        reader = Checkpoints(copy, writer=False)
        assert reader.steps()[-1] == 3 and equal(reader.restore(state(0))[0], state(3))


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged(saved, damage, tmp_path, capsys):
    """It is named, and the checkpoint before is read; Orbax itself would load what a flipped bit has changed."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    files = [path for path in sorted((copy / "3").rglob("*")) if path.is_file() and path.parent != copy / "3"]
    assert {path.relative_to(copy / "3").parts[0] for path in files} == {"ema", "weights", "state", "data", "outcome"}
    checkpoints = Checkpoints(copy, writer=False)
    for file in files:
        before = file.read_bytes()
        DAMAGES[damage](file)
        restored, position, _ = checkpoints.restore(state(0))
        file.write_bytes(before)
        name = file.relative_to(copy / "3").as_posix()
        assert f"the checkpoint {copy / '3'} is damaged ({name} " in capsys.readouterr().err
        assert equal(restored, state(2)) and position == POSITION
    assert equal(checkpoints.restore(state(0))[0], state(3)) and not capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "commit_success.txt", "_CHECKPOINT_METADATA"])
def test_whatever_is_damaged_next_to_the_items(saved, damage, name, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    DAMAGES[damage](copy / "3" / name)
    restored, _, _ = Checkpoints(copy, writer=False).restore(state(0))
    assert any(equal(restored, state(step)) for step in (2, 3))


def test_parts_that_are_not_read_need_not_be_there(saved, tmp_path, capsys):
    """As in a copy of a trained model, which has no optimizer state."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("state", "weights", "data"))
    assert equal(Checkpoints(copy, writer=False).restore_part("ema", state(0).ema)[0], state(3).ema)
    assert not capsys.readouterr().err


# Orbax leaves its other reads unawaited when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_of_older_versions_have_no_manifest(saved, tmp_path, capsys):
    """They are read, with a warning; what Orbax can't read is still passed over."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    for step in "23":
        (copy / step / "manifest.json").unlink()
    checkpoints = Checkpoints(copy, writer=False)
    assert equal(checkpoints.restore(state(0))[0], state(3))
    assert f"{copy / '3'} has no manifest.json" in capsys.readouterr().err
    DAMAGES["cut"](copy / "3" / "ema" / "manifest.ocdbt")
    assert equal(checkpoints.restore(state(0))[0], state(2))
    assert f"the checkpoint {copy / '3'} is damaged" in capsys.readouterr().err
    gc.collect()  # here, rather than in another test


def test_a_lost_process_is_no_full_disk(tmp_path, monkeypatch):
    """Of several processes, those that are left find out by who watches, and are started again."""
    checkpoints = Checkpoints(tmp_path, writer=True)

    def lost():
        try:
            raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("it can't be saved") from error

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", lost)
    with pytest.raises(UserError, match="can't be written"):
        checkpoints.wait()
    monkeypatch.setattr(processes, "_client", object())
    with pytest.raises(ValueError, match="it can't be saved"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
