"""`--mode=prepare`: each good scene is in the data set once, whatever happens; all others have a reason."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest

from walt_jax import main
from walt_jax.config import build
from walt_jax.data import beam, cutting, watchdog
from walt_jax.data import prepare as prepare_lib
from walt_jax.data.captioner import CaptionError, caption, open_captioner
from walt_jax.data.media import write_video
from walt_jax.data.prepare import prepare
from walt_jax.data.prepare_config import Knobs, PrepareConfig
from walt_jax.data.raw import list_raw
from walt_jax.data.video import frame_rate, read_clip, read_frames
from walt_jax.errors import UserError
from walt_jax.workdir import locked

pytest.importorskip("apache_beam", reason='apache_beam is not installed: pip install -e ".[prepare]"')
pytest.importorskip("scenedetect", reason='scenedetect is not installed: pip install -e ".[prepare]"')

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
ROOT = pathlib.Path(__file__).parents[2]
KNOBS = {"min_seconds": 1.0, "shard_bytes": 20_000, "runner_options": ("--direct_num_workers=1",)}

# The files of `raw_videos`: how many scenes each has, and how many of them are good.
SCENES = {"a.mp4": (1, 1), "b.mp4": (2, 2), "deep/c.mp4": (3, 2), "d.gif": (2, 2)}


def shot(seed, frames=14, height=48, width=64):
    """A camera that moves one pixel a frame over patches of random colours."""
    patches = np.random.default_rng(seed).integers(40, 256, (height // 8, width // 4, 3), np.uint8)
    picture = patches.repeat(8, 0).repeat(8, 1)
    return np.stack([picture[:, i : i + width] for i in range(frames)])


@pytest.fixture(scope="module")
def raw_videos(tmp_path_factory):
    """Four videos with eight scenes, seven of them good, and three files that are no video."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "deep").mkdir()
    write_video(folder / "a.mp4", shot(0), 10)
    write_video(folder / "b.mp4", np.concatenate([shot(1), shot(2)]), 10)
    write_video(folder / "deep/c.mp4", np.concatenate([shot(3), shot(4, 1).repeat(14, 0), shot(5)]), 10)
    write_video(folder / "d.gif", np.concatenate([shot(6), shot(7)]), 10)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.webm").write_text("<html>not found</html>")
    (folder / "notes.txt").write_text("no video by its name")
    lines = ["file_name,caption", "a.mp4,one", "b.mp4,first words", "b.mp4,other words", "gone.mp4,not there"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def few(raw_videos, tmp_path_factory):
    """Two of the videos, with three scenes, for quicker tests."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(raw_videos / name, folder / name)
    (folder / "metadata.csv").write_text("file_name,caption\na.mp4,one\n")
    return folder


def config_of(source, **knobs):
    return PrepareConfig(source=str(source), **{**KNOBS, "min_short_side": 16, **knobs})


def examples(out):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(out).as_data_source(split="train")
    return [source[i] for i in range(len(source))]


def content(out):
    return {path.name: path.read_bytes() for path in pathlib.Path(out).glob("*.array_record*")}


@pytest.fixture(scope="module")
def whole(raw_videos, tmp_path_factory):
    """A data set made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(config_of(raw_videos), out)
    return out


def test_each_good_scene_is_there_once(whole, raw_videos):
    found = examples(whole)
    where = [(example["source"].decode(), float(example["start_seconds"])) for example in found]
    assert len(set(where)) == len(where) == sum(good for _, good in SCENES.values())
    counts = collections.Counter(pathlib.Path(source).relative_to(raw_videos).as_posix() for source, _ in where)
    assert counts == {name: good for name, (_, good) in SCENES.items()}
    for example in found:
        path = whole.parent / "scene.mp4"
        path.write_bytes(example["video"])
        frames = read_clip(path)
        assert frames.shape == (example["frames"], example["height"], example["width"], 3) == (14, 48, 64, 3)
        assert frame_rate(path) == Fraction(example["fps"]) == 10
        start, end = (round(example[f"{at}_seconds"] * 10) for at in ("start", "end"))
        original = read_clip(example["source"].decode(), fps=10)[start:end]
        assert np.abs(frames.astype(float) - original).mean() < 12  # colours lose detail; a frame late, it is 16


def crash_on_b(path, *args, **kwargs):
    """`read_frames` with a decoder that crashes on `b.mp4` in the middle."""
    for index, frame in enumerate(read_frames(path, *args, **kwargs)):
        if pathlib.Path(path).name == "b.mp4" and index == 10:
            os.abort()
        yield frame


def test_a_file_that_crashes_the_decoder_is_dropped_with_a_reason(few, tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "read_frames", crash_on_b)
    prepare(config_of(few), tmp_path / "out")
    assert [pathlib.Path(e["source"].decode()).name for e in examples(tmp_path / "out")] == ["a.mp4"]
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert {row["input"]: row["reason"] for row in report["inputs"]} == {
        "a.mp4": None,
        "b.mp4": "decoding crashes: SIGABRT",
    }
    assert report["dropped_by"] == {"unreadable": 1}


def test_captions_come_from_the_table(whole):
    captions = {pathlib.Path(e["source"].decode()).name: [c.decode() for c in e["captions"]] for e in examples(whole)}
    assert captions == {"a.mp4": ["one"], "b.mp4": ["first words", "other words"], "c.mp4": [], "d.gif": []}


def test_the_report_has_a_row_for_everything(whole):
    report = json.loads((whole / "prepare.json").read_text())
    rows = {row["input"]: row for row in report["inputs"]}
    assert set(rows) == {*SCENES, "empty.mp4", "page.webm", "gone.mp4"}
    assert {name: rows[name]["scenes"] for name in SCENES} == {name: count for name, (count, _) in SCENES.items()}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {
        "empty.mp4": "empty file",
        "page.webm": "not a video: Invalid data found when processing input",
        "gone.mp4": "there is no such file",
    }
    assert report["inputs_kept"] == 4 and report["inputs_dropped"] == 3
    assert report["scenes_kept"] == 7 and report["scenes_dropped"] == 1
    assert report["dropped_by"] == {"static": 1, "unreadable": 3}
    assert all(row["kept"] == (row["reason"] is None) == (row["shard"] is not None) for row in report["scenes"])
    assert report["shards"] == len(content(whole)) > 1
    assert not (whole / "work").exists()


def test_it_reads_back_without_tensorflow(whole):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(whole)!r}).as_data_source(split='train')\n"
        "print(sum(len(source[i]['video']) > 0 for i in range(len(source))), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False"]


class Killed(BaseException):
    """Not caught by anything."""


def test_stopped_anywhere_it_makes_the_same_data_set(whole, raw_videos, tmp_path, monkeypatch):
    """Stops the run before each file that it writes, one after the other, as a kill does; files are atomic."""
    publish, done = beam.publish, collections.Counter()
    writes = 0

    def stopping(path, *rest):
        nonlocal writes
        if not writes:
            raise Killed
        writes -= 1
        publish(path, *rest)
        if path.parent.name == "inputs":
            done[path.name] += 1

    def serial(config, work, unit, todo, function, *_):
        for entry in todo:  # without Beam, whose threads outlive an exception
            function(json.dumps(entry))

    monkeypatch.setattr(prepare_lib, "publish", stopping)
    monkeypatch.setattr(cutting, "publish", stopping)
    monkeypatch.setattr(prepare_lib, "run_each", serial)
    for stops in itertools.count():
        writes = stops % 7  # the most files of an input and its record are four, and of the start two
        try:
            prepare(config_of(raw_videos), tmp_path / "out")
        except Killed:
            assert stops < 100
            continue
        break
    assert stops > 5
    assert done and set(done.values()) == {1}  # no finished input was done again
    assert content(tmp_path / "out") == content(whole)
    assert (tmp_path / "out/prepare.json").read_text() == (whole / "prepare.json").read_text()


def test_the_order_of_work_changes_nothing(whole, raw_videos, tmp_path, monkeypatch):
    run = beam.run_each

    def backwards(config, work, unit, todo, *rest):
        run(config, work, unit, todo[::-1] + todo[:2], *rest)  # and some twice, as runners may

    monkeypatch.setattr(prepare_lib, "run_each", backwards)
    options = ("--direct_num_workers=2",)
    prepare(config_of(raw_videos, runner_options=options), tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_killed_and_started_again_as_a_command(raw_videos, whole, tmp_path, capsys):
    flags = ["--mode=prepare", "--config=configs/prepare.py", f"--workdir={tmp_path / 'out'}"]
    knobs = {"source": raw_videos, "min_short_side": 16, "min_seconds": 1.0, "shard_bytes": 20_000}
    flags += [f"--config.prepare.{name}={value}" for name, value in knobs.items()]
    command = [sys.executable, "-m", "walt_jax.main", *flags]
    records = tmp_path / "out/work/inputs"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (records.exists() and any(records.iterdir())):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    assert there
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote 7 scenes") and "Traceback" not in done.stderr
    found = [(e["source"], float(e["start_seconds"])) for e in examples(tmp_path / "out")]
    assert len(found) == len(set(found)) == 7
    assert content(tmp_path / "out") == content(whole)  # of another process
    assert main.main(["--mode=prepare", f"--workdir={tmp_path / 'out'}"]) == 0  # complete, and knows its config
    assert capsys.readouterr().out == done.stdout


def test_inputs_that_go_and_come_between_runs(raw_videos, tmp_path, monkeypatch):
    """A resumed run uses the current listing of the source: no shard of an earlier one stays."""
    source, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(raw_videos, source)
    config = config_of(source, shard_bytes=2**28)  # one shard, so that its name stays
    monkeypatch.setattr(prepare_lib, "write_metadata", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(config, out)
    assert content(out)
    monkeypatch.undo()
    (source / "deep/c.mp4").unlink()
    (source / "a.mp4").rename(source / "e.mp4")
    (source / "metadata.csv").unlink()
    prepare(config, out)
    counts = collections.Counter(pathlib.Path(e["source"].decode()).name for e in examples(out))
    assert counts == {"b.mp4": 2, "d.gif": 2, "e.mp4": 1}
    (source / "d.gif").unlink()
    with pytest.raises(UserError, match=r"complete data set, but d\.gif"):
        prepare(config, out)


def test_a_list_of_paths(raw_videos, tmp_path):
    lines = [str(raw_videos / "b.mp4"), "../raw.mp4", "", str(raw_videos / "b.mp4")]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/videos.txt").write_text("\n".join(lines))
    shutil.copy(raw_videos / "a.mp4", tmp_path / "raw.mp4")
    prepare(config_of(tmp_path / "lists/videos.txt"), tmp_path / "out")
    assert len(examples(tmp_path / "out")) == 3
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    assert report["dropped_by"] == {"duplicate": 1} and len(report["inputs"]) == 3


def test_remote_folders(raw_videos, tmp_path, monkeypatch):
    """A bucket in memory, through the same file system layer as a real one."""
    import fsspec
    from etils import epath
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")

    from etils.epath import backend

    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gs", Bucket, clobber=True)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket())
    for name in ("a.mp4", "metadata.csv", "empty.mp4"):
        epath.Path("gs://raw", name).parent.mkdir(parents=True, exist_ok=True)
        epath.Path("gs://raw", name).write_bytes((raw_videos / name).read_bytes())
    prepare(config_of("gs://raw"), "gs://made/out")
    for path in epath.Path("gs://made/out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (example,) = examples(tmp_path)
    assert example["source"] == b"gs://raw/a.mp4" and [c.decode() for c in example["captions"]] == ["one"]


def test_short_side_and_fps(few, tmp_path):
    prepare(config_of(few, short_side=24, fps=20.0), tmp_path / "out")
    for example in examples(tmp_path / "out"):
        assert (example["height"], example["width"], example["fps"], example["frames"]) == (24, 32, 20, 28)


# Captions


def name_colour(frames, captions):
    """A captioner that describes its arguments."""
    return [f"{len(frames)} frames of {frames.shape[1:]} {frames.dtype}", *captions]


def test_a_function_captions(few, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent)
    prepare(config_of(few, captioner="test_prepare:name_colour", caption_frames=3), tmp_path / "out")
    for example in examples(tmp_path / "out"):
        assert example["captions"][0] == b"3 frames of (48, 64, 3) uint8"
        assert (example["captions"][-1] == b"one") == example["source"].endswith(b"a.mp4")


def test_a_command_captions():
    command = "ls -1"
    captioner = open_captioner(PrepareConfig(source="x", caption_command=command))
    assert caption(captioner, np.zeros((3, 8, 8, 3), np.uint8), ["old"]) == ["000.png", "001.png", "002.png"]
    captioner = open_captioner(PrepareConfig(source="x", caption_command="sh -c 'echo sorry >&2; exit 3'"))
    with pytest.raises(CaptionError, match="failed: exit code 3, sorry"):
        caption(captioner, np.zeros((3, 8, 8, 3), np.uint8), [])


@pytest.mark.parametrize("answer", ["", [], [" "], None, [1]])
def test_no_caption_is_an_error(answer):
    with pytest.raises(CaptionError):
        caption(lambda *_: answer, np.zeros((1, 8, 8, 3), np.uint8), [])


def test_a_scene_that_can_not_be_captioned_is_dropped(few, tmp_path, monkeypatch):
    def fails_on_one(frames, captions):
        if "one" in captions:
            raise RuntimeError("no words")
        return "words"

    monkeypatch.setattr(cutting, "open_captioner", lambda config: fails_on_one)
    prepare(config_of(few), tmp_path / "out")
    assert {tuple(example["captions"]) for example in examples(tmp_path / "out")} == {(b"words",)}
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    reasons = [row["reason"] for row in report["scenes"] if row["dropped_by"] == "caption"]
    assert reasons == ["the captioner failed: RuntimeError: no words"]


# Mistakes


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"source": ""}, "source is not set"),
        ({"source": "nowhere"}, "nowhere is not there"),
        ({"captioner": "no_such_module:f"}, "can't be imported"),
        ({"caption_command": "no_such_program --fast"}, "names no program"),
        ({"min_short_side": 1000}, "No scene of"),
        ({"runner": "NoSuchRunner"}, "NoSuchRunner"),
        ({"min_secondz": 3}, "did you mean 'min_seconds'"),
        ({"max_seconds": 3.0}, "too short"),
        ({"captioner": "a:b", "caption_command": "c"}, "keep one"),
    ],
)
def test_mistakes_are_a_sentence(knobs, sentence, raw_videos, tmp_path):
    with pytest.raises(UserError, match=sentence) as error:
        config = build(Knobs, {"prepare": {"source": str(raw_videos), **knobs}}, "config").prepare
        prepare(config, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_a_sentence(monkeypatch, tmp_path, raw_videos, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    flags = [f"--config={ROOT / 'configs/prepare.py'}", f"--config.prepare.source={raw_videos}"]
    assert main.main(["--mode=prepare", *flags, f"--workdir={tmp_path / 'out'}"]) == 1
    assert 'apache_beam; run pip install -e ".[prepare]"' in capsys.readouterr().err


def test_another_config_is_refused_and_another_runner_is_not(whole, raw_videos):
    with pytest.raises(UserError, match=r"config.prepare.min_seconds=1.0, not 0.5"):
        prepare(config_of(raw_videos, min_seconds=0.5), whole)
    prepare(config_of(raw_videos, runner_options=("--direct_num_workers=2",)), whole)


def test_one_killed_right_after_its_folder_was_made_is_resumed(few, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.0123abcd").write_text('{"prep')  # a file that was being written
    prepare(config_of(few), tmp_path)
    assert len(examples(tmp_path)) == 3


def test_a_second_writer_is_refused(few, tmp_path):
    with (
        locked(tmp_path / "out"),
        pytest.raises(UserError, match=r"Another process is writing to .* choose another --workdir"),
    ):
        prepare(config_of(few), tmp_path / "out")


def test_a_folder_of_something_else_is_refused(raw_videos, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        prepare(config_of(raw_videos), tmp_path)


def test_a_broken_disk_stops_the_run_and_drops_nothing(few, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "write_video_stream", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        prepare(config_of(few), tmp_path / "out")
    monkeypatch.undo()
    prepare(config_of(few), tmp_path / "out")
    assert len(examples(tmp_path / "out")) == 3


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"", b"\n\n"])
def test_invalid_lists_are_refused(text, tmp_path):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=r"list\.txt"):
        list_raw(tmp_path / "list.txt")


def test_the_config_has_the_fields_of_the_dataclass_and_their_defaults():
    knobs = runpy.run_path(str(ROOT / "configs/prepare.py"))["get_config"]().to_dict()["prepare"]
    fields = dataclasses.asdict(PrepareConfig(source="x"))
    assert knobs == {**fields, "source": ""}


def test_files_that_break_loaders_are_dropped_with_a_reason(tmp_path):
    """One file of each of the worst kinds."""
    if not (SHARED / "bad").exists():
        pytest.skip(f"{SHARED / 'bad'} is not there")
    names = ["audio_only.mp4", "zero_frames_14B.gif", "resolution_change.ts", "rate_23976.mp4", "one_frame_8x8.webm"]
    names += ["encrypted_vp9.webm", "zero_bytes.webm", "header_only.flv", "two_frames.mp4", "jpeg_named.mp4"]
    (tmp_path / "list.txt").write_text("\n".join(str(SHARED / "bad" / name) for name in names))
    prepare(config_of(tmp_path / "list.txt", min_seconds=1.5), tmp_path / "out")
    report = json.loads((tmp_path / "out/prepare.json").read_text())
    kept = {pathlib.Path(row["input"]).name for row in report["inputs"] if row["reason"] is None}
    assert len(report["inputs"]) == len(names) and kept == {"rate_23976.mp4"}
