"""A data set of latents has each clip once, however often writing was stopped, and knows its tokenizer."""

import concurrent.futures
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from walt_jax import workdir
from walt_jax.data import latents
from walt_jax.data.latents import Encoded, LatentClips, write_latents
from walt_jax.errors import UserError
from walt_jax.parallel import processes

IDENTITY = {"tokenizer": "abc", "seed": 0}
SIZES = [(1, 2, 3), (5, 2, 2)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "CLIPS_PER_SHARD", 3)


def clip(number):
    size = SIZES[number % 2]
    return Encoded(np.random.default_rng(number).normal(size=(*size, 4)).astype(np.float32), f"clip {number} “ü”")


def usable(number):
    return not 3 <= number < 6 and number != 7  # a whole shard, and one of another


class Encoder:
    def __init__(self, stop_at=None):
        self.numbers, self.stop_at = [], stop_at

    def __call__(self, numbers):
        for number in numbers:
            if number == self.stop_at:
                raise KeyboardInterrupt
            self.numbers.append(number)
            if usable(number):
                yield clip(number)


KEPT = [number for number in range(11) if usable(number)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_each_clip_reads_back(tmp_path):
    report = write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
    clips = LatentClips(tmp_path / "out", tokenizer="abc")
    assert len(clips) == report["clips"] == len(KEPT)
    assert report["latents_bytes"] == sum(clip(number).latents.nbytes for number in KEPT)
    for index in (*range(len(KEPT)), 0):  # and again, from memory
        expected = clip(KEPT[index])
        np.testing.assert_array_equal(clips[index].latents, expected.latents)
        assert clips[index].latents.dtype == np.float32
        assert clips[index].caption == expected.caption
        assert tuple(clips.sizes[index]) == expected.latents.shape[:3]


def test_tfds_reads_it(tmp_path):
    write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert len(source) == len(KEPT)
    np.testing.assert_array_equal(source[1]["latents"], clip(1).latents)


@pytest.mark.parametrize("stop_at", range(0, 11, 2))
def test_stopped_and_resumed_it_is_the_same_to_the_byte(stop_at, tmp_path):
    write_latents(tmp_path / "whole", IDENTITY, 11, Encoder())
    stopped = Encoder(stop_at)
    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "out", IDENTITY, 11, stopped)
    with pytest.raises(UserError, match="holds no complete data set of latents"):
        LatentClips(tmp_path / "out")
    again = Encoder()
    write_latents(tmp_path / "out", IDENTITY, 11, again)
    assert again.numbers[0] == stop_at // 3 * 3  # shards that were done are not made again
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out" / latents.WORK).exists()


def test_an_examples_bytes_are_those_of_any_process(tmp_path):
    """A process has an order of its own for the features of an example unless they are sorted."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    embedded = [clip(number)._replace(embeddings=np.ones((2, 5), np.float32)) for number in range(3)]
    write_latents(tmp_path, IDENTITY, 3, lambda numbers: embedded, lambda: np.ones((1, 5), np.float32))
    (shard,) = tmp_path.glob("*.array_record-*")
    for record in array_record_module.ArrayRecordReader(str(shard)).read_all():
        assert record == tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
        names = [name.encode() for name in ("caption", "embeddings", "latents")]
        assert sorted(names, key=record.index) == names


def test_one_killed_right_after_its_folder_was_made_is_resumed(tmp_path):
    (tmp_path / "out/work").mkdir(parents=True)
    (tmp_path / "out/work/.0123abcd").write_text('{"ident')  # a file that was being written
    write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
    assert len(LatentClips(tmp_path / "out")) == len(KEPT)


def test_a_second_writer_is_refused(tmp_path):
    def twice(numbers):
        with pytest.raises(UserError, match=r"Another process is writing to .* choose another --out"):
            write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
        return Encoder()(numbers)

    write_latents(tmp_path / "out", IDENTITY, 11, twice)
    assert len(LatentClips(tmp_path / "out")) == len(KEPT)


def test_a_complete_one_is_left_as_it_is(tmp_path):
    first = write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
    encoder = Encoder()
    assert write_latents(tmp_path / "out", IDENTITY, 11, encoder) == first
    assert encoder.numbers == []


def test_memory_is_kept_within_its_limit(tmp_path):
    write_latents(tmp_path / "out", IDENTITY, 11, Encoder())
    first = clip(0).latents.nbytes
    clips = LatentClips(tmp_path / "out", cache_bytes=first + 1)
    assert clips[0].latents is clips[0].latents
    assert clips[2].latents is not clips[2].latents


def test_other_latents_are_not_mixed_with_them(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_latents(out, IDENTITY, 11, Encoder(6))
    with pytest.raises(UserError, match="holds latents whose tokenizer is 'abc', not 'other'"):
        write_latents(out, {**IDENTITY, "tokenizer": "other"}, 11, Encoder())
    write_latents(out, IDENTITY, 11, Encoder())
    with pytest.raises(UserError, match="holds latents whose count is 11, not 12"):
        write_latents(out, IDENTITY, 12, Encoder())
    with pytest.raises(UserError, match="latents of another tokenizer than this run's"):
        LatentClips(out, tokenizer="other")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine.txt and no data set that was begun; choose an empty folder"):
        write_latents(tmp_path, IDENTITY, 11, Encoder())
    with pytest.raises(UserError, match="make it with --mode=encode"):
        LatentClips(tmp_path)
    (tmp_path / "mine.txt").unlink()
    (tmp_path / "encode.json").write_text(json.dumps({"identity": {}}))
    with pytest.raises(UserError, match=r"dataset_info\.json is not there"):
        LatentClips(tmp_path)


def test_no_usable_clip_is_an_error(tmp_path):
    with pytest.raises(UserError, match="None of the 2 clips"):
        write_latents(tmp_path / "out", IDENTITY, 2, lambda numbers: [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_there_as_they_were(tmp_path, dtype):
    def embedded(number):
        tokens = np.random.default_rng(number).normal(size=(1 + number % 3, 5))
        one = clip(number)
        return one._replace(embeddings=tokens.astype(jnp.dtype(dtype)), low_res=one.latents[:, :1] + 1)

    identity = {**IDENTITY, "text": "t5", "low_res": "small"}
    empty = embedded(99).embeddings
    write_latents(tmp_path, identity, 5, lambda numbers: map(embedded, numbers), lambda: empty)
    clips = LatentClips(tmp_path, tokenizer="abc", text="t5")
    source = tfds.builder_from_directory(tmp_path).as_data_source("train")
    for number in (*range(5), 0):
        found, expected, twin = clips[number], embedded(number).embeddings, source[number]
        assert found.embeddings.dtype == expected.dtype
        np.testing.assert_array_equal(found.embeddings, expected)
        for name in ("latents", "low_res", "embeddings"):  # as TFDS reads it
            assert getattr(found, name).dtype == twin[name].dtype
            np.testing.assert_array_equal(getattr(found, name), twin[name])
        assert found.caption == twin["caption"].decode()
    assert clips.empty.dtype == empty.dtype
    np.testing.assert_array_equal(clips.empty, empty)
    with pytest.raises(UserError, match=r"config\.text"):
        LatentClips(tmp_path, text="another")


def test_without_embeddings_there_are_none(tmp_path):
    write_latents(tmp_path, IDENTITY, 2, Encoder())
    assert LatentClips(tmp_path).empty is None
    assert LatentClips(tmp_path)[0].embeddings is None
    with pytest.raises(UserError, match=r"config\.text"):
        LatentClips(tmp_path, text="t5")


@pytest.mark.parametrize("stop_at", [None, 5, 9])
def test_several_processes_write_what_one_writes(stop_at, tmp_path, monkeypatch):
    """As threads: each makes its shards, also where one of both was stopped before."""
    write_latents(tmp_path / "whole", IDENTITY, 11, Encoder())
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            write_latents(tmp_path / "out", IDENTITY, 11, Encoder(stop_at))
    here, barrier, board = threading.local(), threading.Barrier(2, timeout=30), [None, None]

    def exchanged(value):
        board[here.index] = value
        barrier.wait()
        values = list(board)
        barrier.wait()
        return values

    for module in (latents, processes):
        monkeypatch.setattr(module, "exchanged", exchanged)
        monkeypatch.setattr(module, "place", lambda: (here.index, 2))
    for module in (workdir, processes):
        monkeypatch.setattr(module, "is_first", lambda: here.index == 0)

    def process(index):
        here.index, encoder = index, Encoder()
        return write_latents(tmp_path / "out", IDENTITY, 11, encoder), encoder.numbers

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (report, numbers), (other, others) = pool.map(process, range(2))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert report == other and not set(numbers) & set(others)
    if stop_at is None:
        assert numbers == [0, 1, 2, 6, 7, 8] and others == [3, 4, 5, 9, 10]
