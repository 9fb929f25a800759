"""Batches have each clip once an epoch, depend only on seed and position, and can be resumed."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.batches import Batches
from walt_jax.data.clips import StoredClips
from walt_jax.data.drawn import DrawnClips
from walt_jax.data.media import write_video
from walt_jax.data.order import WHOLE, Part
from walt_jax.data.pipeline import Clips, Data, DataConfig, Mixture, weighted
from walt_jax.data.shapes import ClipShape
from walt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Clips whose first pixel is their index and the second is drawn from the generator.

    Some are known to be unusable, others turn out to be when they are read.
    """

    count: int
    unusable: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    @property
    def captions(self):
        return [str(index) for index in range(self.count)]

    def kind(self, index, rng):
        return None if index in self.unusable else (0, 1, 1, 2)

    def sample(self, index, rng):
        if index in self.unusable + self.broken:
            return None
        return {
            "video": np.array([index, rng.integers(256)], np.uint8).reshape(1, 1, 2, 1),
            "caption": str(index),
            "shape": 0,
        }


@dataclasses.dataclass(frozen=True)
class Several(Numbered):
    """The same, a clip in one of three sizes that its generator draws."""

    def kind(self, index, rng):
        clip = Numbered.sample(self, index, rng) if index not in self.broken else rng.integers(256) is not None
        shape = int(rng.integers(3))
        return clip and (shape, 1, shape + 1, 2)

    def sample(self, index, rng):
        clip = Numbered.sample(self, index, rng)
        shape = int(rng.integers(3))
        return clip and {**clip, "video": np.repeat(clip["video"], shape + 1, axis=1), "shape": shape}


def batches(source, batch_size, seed, encode=None, caption_dropout=0.0, part=WHOLE):
    sizes = (batch_size,) if isinstance(batch_size, int) else batch_size
    return Batches(Clips(Mixture((source,), (1.0,)), seed, encode, caption_dropout), sizes, part)


def encode(captions):
    """Ids that tell the caption: its number plus one, 0 for none."""
    return np.array([[int(caption) + 1 if caption else 0] for caption in captions], np.int32)


def taken(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def indices(several):
    return np.concatenate([batch["video"][:, 0, 0, 0, 0] for batch in several]).tolist()


def same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    return True


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_every_epoch_has_each_clip_once(count, batch_size, seed):
    steps = -(-3 * count // batch_size)
    order = indices(taken(batches(Numbered(count), batch_size, seed, encode, 0.0), steps))
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_in_order_and_in_what_is_random_about_a_clip():
    several = taken(batches(Numbered(20), 20, 3, encode, 0.0), 4)
    assert len({tuple(indices([batch])) for batch in several}) == 4
    drawn = [dict(batch["video"].reshape(20, 2).tolist()) for batch in several]
    for index in range(20):
        assert len({epoch[index] for epoch in drawn}) > 1
    assert len({tuple(sorted(epoch.values())) for epoch in drawn}) == 4


def test_shapes_types_and_that_a_caption_stays_with_its_clip():
    for batch in taken(batches(Numbered(7), 4, 0, encode, 0.0), 5):
        assert (batch["video"].shape, batch["video"].dtype) == ((4, 1, 1, 2, 1), np.uint8)
        assert (batch["text"].shape, batch["text"].dtype) == ((4, 1), np.int32)
        np.testing.assert_array_equal(batch["video"][:, 0, 0, 0, 0] + 1, batch["text"][:, 0])


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000))
def test_the_seed_decides_every_byte(seed):
    def some(seed):
        return taken(
            batches(DrawnClips("train", (ClipShape(2, 8, 8),)), 5, seed, lambda c: np.array([[len(c[0])]]), 0.3), 4
        )

    assert same(some(seed), some(seed))
    assert not all(np.array_equal(a["video"], b["video"]) for a, b in zip(some(seed), some(seed + 1), strict=True))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 1000))
def test_a_restored_iterator_goes_on_with_the_same_bytes(before, batch_size, seed):
    dataset = batches(Numbered(9, unusable=(4,)), batch_size, seed, encode, 0.5)
    iterator = iter(dataset)
    for _ in range(before):
        next(iterator)
    position = json.dumps(iterator.get_state())  # what a checkpoint keeps
    expected = [next(iterator) for _ in range(6)]
    fresh = iter(batches(Numbered(9, unusable=(4,)), batch_size, seed, encode, 0.5))
    fresh.set_state(json.loads(position))
    assert same([next(fresh) for _ in range(6)], expected)


def test_the_position_is_small():
    iterator = iter(
        batches(DrawnClips("train", (ClipShape(17, 32, 32),)), 8, 0, lambda c: np.zeros((1, 4), np.int32), 0.1)
    )
    for _ in range(20):
        next(iterator)
    assert len(json.dumps(iterator.get_state())) < 1000


def test_clips_that_can_not_be_used_are_left_out_and_the_others_are_not():
    order = indices(taken(batches(Numbered(10, unusable=(0, 3, 9)), 7, 1, encode, 0.0), 5))
    assert collections.Counter(order) == dict.fromkeys((1, 2, 4, 5, 6, 7, 8), 5)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_as_often_as_asked_for(probability):
    several = taken(batches(Numbered(100), 100, 0, encode, probability), 20)
    dropped = np.stack([batch["text"][np.argsort(batch["video"][:, 0, 0, 0, 0])][:, 0] == 0 for batch in several])
    assert abs(dropped.mean() - probability) < 4 * np.sqrt(0.25 / dropped.size) * (0 < probability < 1) + 1e-9
    if probability == 0.5:  # of each clip, in some epochs
        assert ((dropped.mean(0) > 0) & (dropped.mean(0) < 1)).all()


def test_without_an_encoder_there_is_no_text():
    (batch,) = taken(batches(Numbered(3), 3, 0), 1)
    assert set(batch) == {"video"}


def test_a_dropped_caption_changes_nothing_about_the_clip():
    kept, dropped = (taken(batches(Numbered(10), 5, 4, encode, probability), 4) for probability in (0.0, 1.0))
    for one, other in zip(kept, dropped, strict=True):
        np.testing.assert_array_equal(one["video"], other["video"])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 12), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 1000))
def test_clips_wait_until_a_batch_of_their_shape_is_full_and_a_state_has_them(before, sizes, seed):
    source = Several(11, unusable=(2,))
    iterator = iter(batches(source, sizes, seed, encode))
    for _ in range(before):
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(8)]
    fresh = iter(batches(source, sizes, seed, encode))
    fresh.set_state(position)
    assert same([next(fresh) for _ in range(8)], expected)
    for batch in expected:
        shape = batch["video"].shape[2] - 1
        assert len(batch["video"]) == len(batch["text"]) == sizes[shape]
        np.testing.assert_array_equal(batch["video"][:, 0, 0, 0, 0] + 1, batch["text"][:, 0])


def planned_by_hand(clips, sizes, count):
    """The slow twin of batches without broken clips: (shape, numbers) each, from clips that are read in order."""
    waiting, found = {}, []
    for number in itertools.count():
        clip = clips[number]
        if clip is None:
            continue
        alike = waiting.setdefault(clip["shape"], [])
        alike.append(number)
        if len(alike) == sizes[clip["shape"]]:
            found.append(waiting.pop(clip["shape"]))
        if len(found) == count:
            return found


@pytest.mark.parametrize("source", [Numbered(11, (2,)), Several(11, (2,)), Several(11, (2,), (3, 5))])
@pytest.mark.parametrize("parts", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 3), (1, 2)], [(0,), (1,), (2,), (3,)]])
def test_batches_are_the_same_for_any_number_of_processes_and_restarts(source, parts):
    """Of one source and of a mixture with fewer clips than processes; each goes on from the first one's state."""
    few = Several(3)
    sizes = (4, 8, 4)
    for mixture in (Mixture((source,), (1.0,)), Mixture((source, few), (1.0, 2.0))):
        clips = Clips(mixture, 5, encode)
        whole = taken(Batches(clips, sizes), 9)
        if not source.broken:
            for batch, numbers in zip(whole, planned_by_hand(clips, sizes, 9), strict=True):
                np.testing.assert_array_equal(batch["video"], [clips[number]["video"] for number in numbers])
        processes = [iter(Batches(clips, sizes, Part(shards, 4))) for shards in parts]
        for step, batch in enumerate(whole):
            if step == 5:
                (state,) = {json.dumps(process.get_state()) for process in processes}
                processes = [iter(Batches(clips, sizes, Part(shards, 4))) for shards in parts]
                for process in processes:
                    process.set_state(json.loads(state))
            rows = [Part(shards, 4).rows(len(batch["text"])) for shards in parts]
            for process, mine in zip(processes, rows, strict=True):
                assert same([next(process)], [{name: array[mine] for name, array in batch.items()}])


def test_a_clip_that_vanishes_while_its_batch_is_read_leaves_its_row_to_another():
    some = batches(Numbered(4), 3, seed=0)
    clip = {"video": np.full((1, 1, 2, 1), 7, np.uint8)}
    for row in range(3):
        found = [None] * 3
        found[row] = clip
        assert (some.join(None, found)["video"] == 7).all() and len(some.join(None, found)["video"]) == 3
    assert some.join(None, [None] * 3) is None


def test_broken_clips_are_replaced_by_others_of_their_batch_and_batches_of_them_are_passed_over():
    several = taken(batches(Numbered(10, broken=(0, 3, 9)), 5, 1, encode), 6)
    plain = taken(batches(Numbered(10), 5, 1, encode), 6)
    for batch, all_of_them in zip(several, plain, strict=True):
        expected, every = [], all_of_them["video"][:, 0, 0, 0, 0].tolist()
        for row in range(5):
            expected.append(next(index for index in every[row:] + every[:row] if index not in (0, 3, 9)))
        assert batch["video"][:, 0, 0, 0, 0].tolist() == expected
    order = indices(taken(batches(Numbered(4, broken=(0, 2)), 1, 1, encode), 10))
    assert collections.Counter(order) == {1: 5, 3: 5}


def test_several_sources_are_one_and_take_turns_by_weight(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(6):
            write_video(tmp_path / name / f"{index}.mp4", np.full((5, 16, 16, 3), 20 * index, np.uint8), 8)
    shapes = (ClipShape(5, 8, 8),)
    plain = Data(DataConfig(f"{tmp_path / 'a'}, {tmp_path / 'b'}", 5, 8, 8)).source("train", shapes)
    assert len(plain) == 10 and len(plain.sources) == 2 and plain.weights == (5.0, 5.0)
    assert plain.sample(9, np.random.default_rng(0))["video"].shape == (5, 8, 8, 3)
    weighted = Data(DataConfig(f"{tmp_path / 'a'}*3, {tmp_path / 'b'}, drawn", 5, 8, 8)).source("train", shapes)
    assert weighted.weights == (3.0, 1.0, 1.0)
    order = Clips(weighted, 0)._order
    assert collections.Counter(order[number].source for number in range(50)) == {0: 30, 1: 10, 2: 10}


def test_an_older_versions_position_is_refused():
    with pytest.raises(UserError, match="older version"):
        iter(batches(Numbered(3), 1, 0)).set_state({"next_index": 3})


def test_drawn_clips_are_opened():
    shapes = (ClipShape(17, 32, 32), ClipShape(1, 16, 16))
    data = Data(DataConfig("drawn", frames=17, height=32, width=32))
    assert data.source("held_out", shapes) == Mixture((DrawnClips("held_out", shapes),), (9.0,))
    assert data.skipped == []


def test_a_folder_is_opened_and_looked_through_once(tmp_path, monkeypatch):
    for index in range(12):
        write_video(tmp_path / f"{index}.mp4", np.full((9, 16, 24, 3), 20 * index, np.uint8), 8)
    (tmp_path / "bad.mp4").write_bytes(b"")
    rows = "".join(f"{index}.mp4,clip {index}\n" for index in range(12))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + rows)
    data = Data(DataConfig(str(tmp_path), frames=5, height=16, width=24))
    parts = {split: data.source(split, (ClipShape(5, 16, 24),)) for split in ("train", "held_out")}
    assert all(isinstance(mixture.sources[0], StoredClips) for mixture in parts.values())
    assert parts["train"].sources[0].store is parts["held_out"].sources[0].store
    captions = [caption for mixture in parts.values() for caption in mixture.captions]
    assert sorted(captions) == sorted(f"clip {index}" for index in range(12))
    assert parts["train"].sample(0, np.random.default_rng(0))["video"].shape == (5, 16, 24, 3)
    assert data.skipped == [{"file": str(tmp_path / "bad.mp4"), "reason": "not in metadata.csv"}]


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"config\.data\.source is not set; give a folder"):
        Data(DataConfig("", 17, 32, 32)).source("train", (ClipShape(17, 32, 32),))
    with pytest.raises(UserError, match="Drawn clips are square; height=16 and width=32 differ"):
        Data(DataConfig("drawn", 17, 32, 32)).source("train", (ClipShape(1, 16, 32),))
    with pytest.raises(ValueError, match="drawn clips are square; height=32 and width=48 differ"):
        DataConfig("drawn", 17, 32, 48)
    for words in ("a*0", "a*-1", "a*x", "a*", "a*inf"):
        with pytest.raises(ValueError, match=r"source: .* weight above 0 after the \*, as in a\*2"):
            DataConfig(words, 17, 32, 32).parts  # noqa: B018
    with pytest.raises(ValueError, match="captions names no column"):
        DataConfig("drawn", 17, 32, 32, captions=" ,")
    assert weighted("source", "gs://x/a b*2, c") == [("gs://x/a b", 2.0), ("c", None)]


def test_as_many_clips_are_mirrored_as_wanted_and_the_rest_is_as_without():
    def videos(flips):
        clips = Clips(Mixture((DrawnClips("train", (ClipShape(1, 16, 16),)),), (1.0,)), 3, flips=flips)
        return [clips[number]["video"] for number in range(60)]

    plain, some = videos(0.0), videos(0.5)
    mirrored = [np.array_equal(one[:, :, ::-1], other) for one, other in zip(plain, some, strict=True)]
    same = [np.array_equal(one, other) for one, other in zip(plain, some, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 18 < sum(mirrored) < 42
    assert all(np.array_equal(one[:, :, ::-1], other) for one, other in zip(plain, videos(1.0), strict=True))
