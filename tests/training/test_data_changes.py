"""Files that are added, removed or lost between two runs or during one: the order of the others stays."""

import functools
import itertools
import json
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from walt_jax.config import build
from walt_jax.data import latents as latents_lib
from walt_jax.data.latents import LatentClips
from walt_jax.data.media import write_video
from walt_jax.errors import UserError
from walt_jax.evaluation.reconstruction import usable_clips
from walt_jax.parallel.mesh import make_mesh
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_data import RunData

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOKENIZER = {"w": np.zeros(1)}
FILES = 12


def write(folder, level):
    """A clip of one grey, by which it is recognised."""
    write_video(folder / f"{level:03}.gif", np.full((8, 16, 16, 3), level, np.uint8), 8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(FILES):
        write(folder, 10 + 20 * number)
    return folder


class Codec:
    """Latents that say which clip they are of."""

    @staticmethod
    def encode(tokenizer, video):
        return (video[:, :1, :1, :1, :1].astype(np.float32),)


def run_data(folder, **data):
    """What a run in `run` next to a folder of clips reads."""
    knobs = runpy.run_path(str(CONFIGS / "walt_tiny.py"))["get_config"]().to_dict()
    knobs["data"].update(source=str(folder), frames=5, height=16, width=16, fps=8.0, cache_bytes=0, **data)
    config = build(RunConfig, knobs, "config")
    text = types.SimpleNamespace(digest=lambda: None)
    return RunData(
        config,
        folder.parent / "run",
        Codec(),
        text,
        low_res=lambda: None,
        mesh=lambda: make_mesh(config.mesh, jax.devices()),
    )


def levels(batches, count):
    """The greys of so many batches' clips."""
    taken = [batch["video"] for batch in itertools.islice(batches, count)]
    return [int(np.median(clip)) for video in taken for clip in video]


def save(folder, stage="tokenizer"):
    """A checkpoint, as far as the data is concerned."""
    (folder.parent / "run" / "checkpoints" / stage / "3").mkdir()


@pytest.mark.parametrize("change", ["nothing", "added", "removed", "both", "renamed"])
def test_a_resumed_stage_keeps_its_order(change, folder, capsys):
    whole = levels(run_data(folder).batches("tokenizer"), 40)
    assert len(set(whole)) > FILES / 2
    before = iter(run_data(folder).batches("tokenizer"))
    begun = levels(before, 3)
    state = json.loads(json.dumps(before.get_state()))
    save(folder)
    lost = set()
    if change in ("added", "both"):
        write(folder, 0)  # the first by its name
        write(folder, 255)
    if change in ("removed", "both", "renamed"):
        lost = set(whole[6:8])  # the next ones
        for level in lost:
            file = folder / f"{level:03}.gif"
            file.rename(folder / f"a{level:03}.gif") if change == "renamed" else file.unlink()
    capsys.readouterr()
    after = iter(run_data(folder).batches("tokenizer"))
    after.set_state(state)
    resumed = begun + levels(after, 30)
    expected = begun + [level for level in whole[6:] if level not in lost]
    assert resumed[:60] == expected[:60]
    warning = capsys.readouterr().err
    assert ("warning: clips of" in warning) == (change != "nothing")
    assert ("2 added (000.gif, 255.gif)" in warning) == (change in ("added", "both"))
    assert ("removed (" in warning) == (change in ("removed", "both", "renamed"))
    assert warning.count("\n") == (change != "nothing")


def test_a_stage_that_begins_reads_what_is_there(folder, capsys):
    levels(run_data(folder).batches("tokenizer"), 1)
    write(folder, 255)
    assert 255 in levels(run_data(folder).batches("tokenizer"), 40)  # no checkpoint yet
    assert not capsys.readouterr().err


def test_a_folder_with_other_files_and_a_damaged_record_are_sentences(folder):
    levels(run_data(folder).batches("tokenizer"), 1)
    save(folder)
    record = folder.parent / "run" / "checkpoints" / "tokenizer" / "clips.json"
    good = record.read_text()
    for damage in ("", "[]", "{}", '{"weights": [1], "names": [3]}', "[" * 100_000):
        record.write_text(damage)
        with pytest.raises(UserError, match=r"clips\.json is damaged.*: restore it, or remove it to go on"):
            run_data(folder).batches("tokenizer")
    record.write_text(good)
    for file in folder.iterdir():
        file.rename(folder / f"other_{file.name}")
    with pytest.raises(UserError, match=r"has none of the \d+ clips any more .*restore them"):
        run_data(folder).batches("tokenizer")


@pytest.mark.parametrize("stopped", [True, False])
def test_encoding_keeps_its_order_and_a_complete_set_is_used(stopped, folder, monkeypatch, capsys):
    monkeypatch.setattr(latents_lib, "CLIPS_PER_SHARD", 3)

    def read(out):
        clips = LatentClips(out)
        return [float(clips[index].latents.mean()) for index in range(len(clips))]

    run_data(folder).encode(folder.parent / "whole", "denoiser", 0, TOKENIZER)
    whole = read(folder.parent / "whole")
    out = folder.parent / "latents"
    if stopped:
        write_shard, calls = latents_lib._write_shard, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write_shard(*args)

        monkeypatch.setattr(latents_lib, "_write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_data(folder).encode(out, "denoiser", 0, TOKENIZER)
        monkeypatch.setattr(latents_lib, "_write_shard", write_shard)
    else:
        run_data(folder).encode(out, "denoiser", 0, TOKENIZER)
    write(folder, 0)
    (folder / f"{int(whole[4]):03}.gif").unlink()
    capsys.readouterr()
    run_data(folder).encode(out, "denoiser", 0, TOKENIZER)
    assert "1 added (000.gif) and 1 removed" in capsys.readouterr().err
    assert read(out) == (whole[:4] + whole[5:] if stopped else whole)


@pytest.mark.parametrize("allowed", [0.0, 0.17, 1.0])
def test_files_that_vanish_are_counted_and_stop_the_run_above_the_limit(allowed, folder):
    data = run_data(folder, max_bad_fraction=allowed)
    batches = iter(data.batches("tokenizer"))
    next(batches)
    assert data.gone() == []
    for level in (10, 30, 50, 70):
        (folder / f"{level:03}.gif").unlink()
    if allowed == 1.0:
        levels(batches, 40)
        assert 3 <= len(data.gone()) <= 4  # one may be held out
        assert all(str(folder) in file for file in data.gone())
        return
    sentence = (
        rf"[1-4] of {FILES} files in .* have vanished .* the last being 0\d0\.gif: restore .* now {allowed:g}, to 0"
    )
    with pytest.raises(UserError, match=sentence):
        levels(batches, 80)


def test_held_out_clips_that_vanish_are_replaced_in_the_evaluation(folder):
    rows = [f"{file.name},,{'val' if number < 2 else 'train'}" for number, file in enumerate(sorted(folder.iterdir()))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption,split", *rows]) + "\n")
    unseen = run_data(folder, max_bad_fraction=1.0).unseen().sources[0]
    cut = functools.partial(usable_clips, unseen, range(len(unseen)), count=1, seed=1234)
    for name, level in zip(unseen.names, (10, 30), strict=True):
        clips, captions = cut()
        assert len(clips) == len(captions) == 1 and np.median(clips[0]) == pytest.approx(level, abs=2)
        (folder / name).unlink()
    with pytest.raises(UserError, match="held_out split"):
        cut()
    with pytest.raises(UserError, match="No held-out clip can be read any more"):
        cut()
