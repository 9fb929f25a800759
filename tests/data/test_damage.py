"""Damaged data sets, odd names and unreachable sources end in one sentence that names the file and the remedy."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from walt_jax import main
from walt_jax.data import latents as latents_lib
from walt_jax.data.latents import Encoded, LatentClips, write_latents
from walt_jax.data.listing import read_table, walk
from walt_jax.data.media import write_video
from walt_jax.data.pipeline import Data, DataConfig
from walt_jax.data.records import Records
from walt_jax.data.shapes import ClipShape
from walt_jax.data.shards import serialize, write_metadata
from walt_jax.errors import UserError
from walt_jax.remote import check_reachable

CLIPS = [Encoded(np.full((1, 2, 3, 4), number, np.float32), f"clip {number}") for number in range(3)]
DEEP = "[" * 100_000
TINY = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'walt_tiny.py'}"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Three encoded clips in two shards."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_lib, "CLIPS_PER_SHARD", 2)
        write_latents(folder, {"tokenizer": "abc"}, 3, lambda numbers: [CLIPS[number] for number in numbers])
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three examples of a video in one shard."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder = tmp_path_factory.mktemp("records")
    write_video(folder / "clip.mp4", np.full((9, 16, 16, 3), 99, np.uint8), 8)
    video = (folder / "clip.mp4").read_bytes()
    (folder / "clip.mp4").unlink()
    kinds = tfds.features.FeaturesDict({"video": tfds.features.Text(), "caption": tfds.features.Text()})
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "scenes-train.array_record-00000-of-00001"), "group_size:1"
    )
    for number in range(3):
        writer.write(serialize(kinds, {"video": video, "caption": str(number)}))
    writer.close()
    write_metadata(folder, "scenes", "train", kinds, [3], len(video))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def overwrite(path):
    path.write_bytes(b"not what it was " * 9000)


def overwrite_inside(path):
    content = bytearray(path.read_bytes())
    content[120:180] = bytes(60)
    path.write_bytes(content)


def nest(path):
    path.write_text(DEEP)


def make_a_list(path):
    path.write_text("[]")


def make_an_object(path):
    path.write_text("{}")


SHARD_DAMAGES = (cut, cut_last_byte, remove, empty, overwrite, overwrite_inside)
JSON_DAMAGES = (cut, remove, empty, overwrite, nest, make_a_list, make_an_object)


def read_all(opened):
    return [opened[index] for index in range(len(opened))] if isinstance(opened, LatentClips) else opened


@pytest.mark.parametrize(
    ("kind", "pattern", "damage"),
    [
        *((kind, "*.array_record-00000*", damage) for kind in ("latents", "records") for damage in SHARD_DAMAGES),
        *(
            (kind, name, damage)
            for kind in ("latents", "records")
            for name in ("dataset_info.json", "features.json", "encode.json")
            for damage in JSON_DAMAGES
            # Without dataset_info.json a folder is one of files.
            if not (kind == "records" and (name == "encode.json" or (name, damage) == ("dataset_info.json", remove)))
        ),
        *(("latents", "sizes.npy", damage) for damage in (cut, remove, empty, overwrite)),
    ],
)
def test_damage_is_a_sentence(kind, pattern, damage, latents, records, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree({"latents": latents, "records": records}[kind], folder)
    open_it = {"latents": LatentClips, "records": Records}[kind]
    read_all(open_it(folder))
    (file,) = folder.glob(pattern)
    damage(file)
    with pytest.raises(UserError) as error:
        read_all(open_it(folder))
    sentence = str(error.value)
    assert str(folder) in sentence and "\n" not in sentence
    assert "anew" in sentence or "--mode=encode" in sentence  # the remedy


def test_a_shard_that_is_damaged_inside_is_skipped_within_the_limit(records, tmp_path):
    shutil.copytree(records, tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.array_record-*")
    overwrite_inside(file)
    store = Records(tmp_path / "set", max_bad_fraction=0.5)
    assert store.unreadable == 1 and len(store.rows) == 2
    assert "a shard is damaged" in store.reasons["train/0"]


def test_a_shard_that_is_emptied_while_a_run_reads_stops_it(records, tmp_path):
    shutil.copytree(records, tmp_path / "set")
    data = Data(DataConfig(str(tmp_path / "set"), 5, 16, 16, cache_bytes=0))
    source = data.source("train", (ClipShape(5, 16, 16),)).sources[0]
    assert source.sample(0, np.random.default_rng(0)) is not None
    (file,) = (tmp_path / "set").glob("*.array_record-*")
    empty(file)
    with pytest.raises(UserError, match=r"1 of 3 files in .* have vanished since they were checked"):
        for index in range(len(source)):
            source.sample(index, np.random.default_rng(0))


def test_names_that_are_not_utf8_are_skipped_with_a_reason(tmp_path):
    for name in (b"good.mp4", b"b\xffd.mp4", b"d\xe9r"):
        (os.mkdir if name == b"d\xe9r" else lambda path: open(path, "wb").close())(
            os.path.join(os.fsencode(tmp_path), name)
        )
    listing = walk(latents_lib.epath.Path(tmp_path), (".mp4",))
    assert listing.files == ["good.mp4"]
    assert listing.misnamed == [r"b\xffd.mp4", r"d\xe9r"]
    data = Data(DataConfig(str(tmp_path), 1, 16, 16), refuse=False)
    reasons = {entry["file"]: entry["reason"] for store in data.stores.values() for entry in store.skipped}
    assert reasons[r"b\xffd.mp4"] == reasons[r"d\xe9r"] == "its name is not UTF-8: rename it"
    json.dumps(data.skipped, ensure_ascii=False).encode()


@pytest.mark.parametrize("mode", ["data", "train", "prepare"])
def test_a_source_whose_name_is_not_utf8(mode, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    write_video(folder / "a.mp4", np.full((9, 16, 16, 3), 99, np.uint8), 8)
    flags = [f"--mode={mode}", f"--workdir={tmp_path / 'run'}"]
    if mode == "prepare":
        flags += [TINY.replace("walt_tiny", "prepare"), f"--config.prepare.source={folder}"]
    else:
        flags += [TINY, f"--config.data.source={folder}"]
    assert main.main(flags) == 1
    assert capsys.readouterr().err.endswith(r"d\xe9 is not UTF-8: rename the folder." + "\n")


@pytest.mark.parametrize("line", [DEEP, '{"a":' * 100_000, "[1,", "9" * 5000])
def test_invalid_json_lines_are_a_sentence(line, tmp_path):
    table = latents_lib.epath.Path(tmp_path / "metadata.jsonl")
    table.write_text(line)
    with pytest.raises(UserError, match=r"metadata\.jsonl has a line that is no JSON"):
        read_table(table)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gs://bucket/clips", "pip install gcsfs"),
        ("s3://bucket/clips", "pip install s3fs"),
        ("http://host/clips", "http:// is not supported: copy the files"),
        ("https://host/clips", "https:// is not supported: copy the files"),
    ],
)
def test_remote_sources_without_their_package(source, words, monkeypatch):
    from etils.epath import backend

    def missing(path):
        raise ImportError("no such package")

    monkeypatch.setattr(backend.fsspec_backend, "fs", missing)
    for use in (check_reachable, LatentClips, lambda path: Data(DataConfig(path, 1, 16, 16)).source("train", ())):
        with pytest.raises(UserError, match=words):
            use(source)


@pytest.mark.parametrize("mode", ["data", "train"])
@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        *(("*.array_record-00000*", damage) for damage in SHARD_DAMAGES),
        *(
            (name, damage)
            for name in ("dataset_info.json", "features.json")
            for damage in JSON_DAMAGES
            if (name, damage) != ("dataset_info.json", remove)
        ),
    ],
)
def test_modes_end_in_one_sentence(mode, pattern, damage, records, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(records, folder)
    (file,) = folder.glob(pattern)
    damage(file)
    flags = [TINY, f"--config.data.source={folder}", f"--mode={mode}", f"--workdir={tmp_path / 'run'}"]
    code = main.main(flags)
    captured = capsys.readouterr()
    if mode == "data" and damage is overwrite_inside:  # an example is lost, which the mode reports
        assert code == 0 and "a shard is damaged" in captured.out and "training would stop: " in captured.out
        return
    assert code == 1 and not captured.out
    (sentence,) = captured.err.strip().splitlines()
    assert sentence.startswith("error: ") and str(folder) in sentence and "anew" in sentence


@pytest.mark.parametrize("damage", SHARD_DAMAGES[:-1])  # the last is met when that clip is read
def test_training_on_damaged_latents_ends_in_one_sentence(damage, latents, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(latents, folder)
    (file,) = folder.glob("*.array_record-00000*")
    damage(file)
    flags = [TINY, f"--config.stages.denoiser.latents={folder}", f"--workdir={tmp_path / 'run'}"]
    assert main.main(flags) == 1
    captured = capsys.readouterr()
    (sentence,) = captured.err.strip().splitlines()
    assert sentence.startswith("error: ") and str(folder) in sentence and "--mode=encode" in sentence
