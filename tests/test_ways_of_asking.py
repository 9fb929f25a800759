"""Each way of asking means what it says: the trained demo, judged by the rules that its clips are drawn by.

`WALT_DEMO=runs/demo pytest -m slow tests/test_ways_of_asking.py` takes a run that is there; without, one is trained.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import commands
import pytest

from walt_jax.data.video import read_clip

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = 24
pytestmark = pytest.mark.slow


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The trained demo's workdir."""
    workdir = pathlib.Path(os.environ.get("WALT_DEMO", tmp_path_factory.mktemp("demo") / "demo")).resolve()
    if not workdir.exists():
        run("-m", "walt_jax.main", "--config=configs/walt_demo.py", f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def ways(demo, tmp_path_factory):
    """What `benchmarks/ways_of_asking.py` measures, by the way's name."""
    out = tmp_path_factory.mktemp("ways")
    run("benchmarks/ways_of_asking.py", f"--workdir={demo}", f"--out={out}", f"--clips={CLIPS}")
    return {row["way"]: row for row in json.loads((out / "ways.json").read_text())}


@pytest.mark.parametrize("way", ["text", "first picture", "first and last picture", "a clip at frame 5"])
def test_colour_shape_and_direction_are_those_asked_for(ways, way):
    assert ways[way]["all_right"] >= 0.9


@pytest.mark.parametrize("way", ["between two clips", "extend forward", "extend backward"])
def test_a_clip_goes_on_in_its_colour_shape_and_direction(ways, way):
    assert ways[way]["all_right"] >= 0.9


@pytest.mark.parametrize("way", ["inpaint the right half", "outpaint the middle"])
def test_a_region_is_made_anew_as_asked(ways, way):
    assert ways[way]["all_right"] >= 0.9


def test_an_edited_clip_changes_its_colour(ways):
    row = ways["edit, strength 0.5"]
    assert row["colour_right"] >= 0.75 and row["direction_right"] >= 0.75


def test_a_loop_closes(ways):
    """Its first frame follows its last one as frames follow each other."""
    assert ways["loop of a clip, motion 0.9"]["closing_step"] < 1.5


@pytest.mark.parametrize(
    ("way", "below"),
    [
        ("first picture", 1.5),
        ("extend forward", 1.5),
        ("inpaint the right half", 2.0),
        # encoded as if the video had stood still before
        ("first and last picture", 4.0),
        ("a clip at frame 5", 4.0),
        ("extend backward", 4.0),
        ("between two clips", 5.0),
    ],
)
def test_what_is_given_comes_back_to_the_tokenizers_error(ways, way, below):
    row = ways[way]
    assert row["given_psnr_db"] > row["tokenizer_psnr_db"] - below


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("begun", [False, True])
def test_a_long_video_that_is_stopped_leaves_its_frames_or_nothing(demo, tmp_path, number, begun):
    """Before its first frame there is no file; after, the file can be read, and samples.json says how far it is."""
    out = tmp_path / "out"
    flags = f"--workdir={demo}", "--mode=sample", "--prompt=a red circle moving up", "--num_frames=4001", f"--out={out}"
    process = commands.start(*flags, cache=tmp_path / "cache")  # nothing is compiled
    while not (list(out.glob(".writing_*")) if begun else out.exists()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith(f"stopped; {out} has the frames made so far, see samples.json")
    if not begun:
        assert not list(out.iterdir())
        return
    assert not list(out.glob(".writing_*"))
    [row] = json.loads((out / "samples.json").read_text())
    assert row["complete"] is False and 17 <= row["num_frames"] < 4001
    assert len(read_clip(out / row["file"])) == row["num_frames"]
