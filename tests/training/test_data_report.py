"""The report of `--mode=data` agrees with what training reads: files kept and skipped, and how full packs are."""

import json
import pathlib
import runpy

import numpy as np
import pytest
from PIL import Image

from walt_jax.config import build
from walt_jax.data.media import write_video
from walt_jax.data.packing import Item
from walt_jax.data.pipeline import Data
from walt_jax.training import data_files
from walt_jax.training import data_report as lib
from walt_jax.training.run_config import RunConfig
from walt_jax.training.run_data import RunData

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config_of(folder, **denoiser):
    """Clips of 5 and images of 1 frame: 2 × 2 × 3 and 1 × 3 × 4 tokens of 8 × 8 pixels each, of 16 × 24 ones."""
    knobs = runpy.run_path(str(CONFIGS / "walt_packed.py"))["get_config"]().to_dict()
    knobs["data"].update(source=str(folder), frames=5, height=16, width=16, fps=10.0, max_bad_fraction=0.2)
    knobs["denoiser"]["windows"] = ((1, None, None), (None, 1, 1))
    shapes = {"clip": {"side": 20, "weight": 1.0}, "image": {"frames": 1, "side": 28, "weight": 1.0}}
    knobs["stages"]["denoiser"].update({"shapes": shapes, "pack": {"tokens": 40, "clips": 8}, **denoiser})
    return build(RunConfig, knobs, "config")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for index in range(9):
        write_video(folder / f"{index}.gif", rng.integers(0, 256, (8, 16, 24, 3), np.uint8), 10)
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(folder / "still.png")
    (folder / "bad.mp4").write_text("<html>")
    names = [*(f"{index}.gif" for index in range(9)), "still.png", "bad.mp4"]
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{name},clip {name}\n" for name in names))
    (folder / "stray.mp4").write_text("nobody names it")
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    sheet = tmp_path_factory.mktemp("out") / "data.png"
    config = config_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "LEAST", 120)
        patch.setattr(lib, "WAITING", 16)
        found = lib.report_data(config, Data(config.data, refuse=False), sheet)
    with Image.open(sheet) as image:
        assert min(image.size) > 300
    return json.loads(json.dumps(found))


def test_each_file_is_kept_or_skipped(found):
    assert found["clips_kept"] == 10
    skipped = {pathlib.Path(entry["file"]).name: entry["reason"] for entry in found["clips_skipped"]}
    assert set(skipped) == {"bad.mp4", "stray.mp4"}
    assert skipped["stray.mp4"] == "not in metadata.csv" and skipped["bad.mp4"].startswith("not a video")
    (source,) = found["sources"]
    assert source["train_clips"] + source["held_out_clips"] == 10


def test_clips_have_the_shapes_of_the_stage(found):
    shapes = {(row["frames"], row["height"], row["width"]): row for row in found["shapes"]}
    assert set(shapes) == {(5, 16, 24), (1, 24, 32)}
    assert [shapes[size]["tokens"] for size in ((5, 16, 24), (1, 24, 32))] == [12, 12]
    assert sum(row["clips"] for row in shapes.values()) == found["clips_read"] == 120
    assert shapes[5, 16, 24]["clips"] > 30


def test_packs_are_as_full_as_said(found):
    # Three clips of 12 tokens fit into 40.
    assert found["packs"]["clips_per_pack"] == 3 and found["packs"]["tokens_per_pack"] == 40
    assert found["tokens_valid_fraction"] == pytest.approx(36 / 40)
    assert found["clips_per_second"] > 0 and found["frames_per_second"] > found["clips_per_second"]


def test_without_packs_all_tokens_are_clips(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "LEAST", 4)
    config = config_of(folder, shapes={}, pack=None)
    found = lib.report_data(config, Data(config.data, refuse=False), tmp_path / "data.png")
    assert found["tokens_valid_fraction"] == 1 and found["packs"]["packs"] == 0
    # A still picture has no 5 frames; where it is held out it is found out too.
    assert found["clips_kept"] == 9
    assert {row["frames"] for row in found["shapes"]} == {5}


def test_it_refuses_nothing_and_says_what_training_would_do(folder, found, tmp_path):
    assert found["training"]["would_train"] and found["training"]["unreadable_fraction"] == pytest.approx(1 / 11)
    kept = {pathlib.Path(row["file"]).name for row in found["files_kept"]}
    skipped = {pathlib.Path(row["file"]).name for row in found["clips_skipped"]}
    assert kept | skipped == {path.name for path in folder.iterdir()} - {"metadata.csv"} and not kept & skipped
    (tmp_path / "bad.mp4").write_text("<html>")
    (tmp_path / "odd.xyz").write_text("")
    config = config_of(tmp_path)
    nothing = lib.report_data(config, Data(config.data, refuse=False), tmp_path / "data.png")
    assert nothing["clips_kept"] == 0 and len(nothing["clips_skipped"]) == 2
    assert not nothing["training"]["would_train"]
    assert data_files.verdict(nothing).startswith("training would stop: 1 of 1 files")
    lines = data_files.sentences(nothing)
    assert lines[0] == "0 clips kept, 2 files skipped" and len(lines) == 3


@pytest.mark.parametrize("count", [1, 2, 24])
def test_the_picture_has_no_gap_however_few_packs_there_are(count):
    picture = lib._plots([[Item(0, 12), Item(1, 12)]] * count, [(5, 16, 24), (1, 24, 32)], 40, [])
    blank = "".join("_" if row else "x" for row in (np.asarray(picture.convert("L")) == 255).all(1))
    assert max(map(len, blank.split("x"))) < 40
    assert 400 < picture.height < 500 + 24 * count


def test_training_reports_short_clips_of_both_splits(tmp_path):
    rows = ["file_name,caption,split"]
    for split in ("train", "val"):
        for name, frames in (("long", 8), ("short", 3)):
            write_video(tmp_path / f"{split}_{name}.gif", np.full((frames, 16, 24, 3), 99, np.uint8), 10)
            rows.append(f"{split}_{name}.gif,a,{split}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    config = config_of(tmp_path, shapes={}, pack=None)
    found = RunData(config, tmp_path / "run", codec=None, text=None, low_res=None, mesh=None).report_files()
    skipped = {pathlib.Path(entry["file"]).name: entry["reason"] for entry in found["clips_skipped"]}
    assert set(skipped) == {"train_short.gif", "val_short.gif"}
    assert set(skipped.values()) == {"too short: 3 of 5 frames at 10 fps"} and found["clips_kept"] == 2
    lines = data_files.sentences(found)
    assert lines[0] == "2 clips kept, 2 files skipped"
    assert lines[1].startswith("  2 skipped: too short: 3 of 5 frames at 10 fps (") and "val_short.gif" in lines[1]
