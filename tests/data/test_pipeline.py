"""Batches have each clip once an epoch, depend on seed and position alone, and go on where they were stopped."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.drawn import DrawnClips
from walt_jax.data.folder import FolderClips
from walt_jax.data.media import write_video
from walt_jax.data.pipeline import DataConfig, batches, open_source
from walt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Clips whose first pixel is their index, beside one drawn from the generator; some can't be used."""

    count: int
    unusable: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    @property
    def captions(self):
        return [str(index) for index in range(self.count)]

    def sample(self, index, rng):
        if index in self.unusable:
            return None
        return {"video": np.array([index, rng.integers(256)], np.uint8).reshape(1, 1, 2, 1), "caption": str(index)}


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
        return taken(batches(DrawnClips("train", 2, 8), 5, seed, lambda c: np.array([[len(c[0])]]), 0.3), 4)

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
    iterator = iter(batches(DrawnClips("train", 17, 32), 8, 0, lambda c: np.zeros((1, 4), np.int32), 0.1))
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


def test_drawn_clips_are_opened():
    config = DataConfig("drawn", frames=17, height=32, width=32)
    assert open_source(config, "held_out") == DrawnClips("held_out", 17, 32)
    assert open_source(config, "train", (1, 16, 16)) == DrawnClips("train", 1, 16)


def test_a_folder_is_opened(tmp_path):
    for index in range(12):
        write_video(tmp_path / f"{index}.mp4", np.full((9, 16, 24, 3), 20 * index, np.uint8), 8)
    rows = "".join(f"{index}.mp4,clip {index}\n" for index in range(12))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + rows)
    config = DataConfig(str(tmp_path), frames=5, height=16, width=24)
    parts = {split: open_source(config, split) for split in ("train", "held_out")}
    assert all(isinstance(source, FolderClips) for source in parts.values())
    captions = [caption for source in parts.values() for caption in source.captions]
    assert sorted(captions) == sorted(f"clip {index}" for index in range(12))
    assert parts["train"].sample(0, np.random.default_rng(0))["video"].shape == (5, 16, 24, 3)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"config\.data\.source is not set; give a folder"):
        open_source(DataConfig("", 17, 32, 32), "train")
    with pytest.raises(UserError, match="Drawn clips are square; height=16 and width=32 differ"):
        open_source(DataConfig("drawn", 17, 32, 32), "train", (1, 16, 32))
    with pytest.raises(ValueError, match="drawn clips are square; height=32 and width=48 differ"):
        DataConfig("drawn", 17, 32, 48)
