"""Clips are encoded with others of their size; batches and packs hold them unchanged, with captions, once an epoch."""

import collections
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from walt_jax.data.dropping import DropConfig
from walt_jax.data.latents import Encoded
from walt_jax.data.order import WHOLE, Order, Part
from walt_jax.denoiser.layout import from_tokens, to_tokens
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.errors import UserError
from walt_jax.parallel.processes import merged
from walt_jax.training import latent_batches, pack_batches
from walt_jax.training.latent_batches import dense_batches, encoded_clips, latents_path
from walt_jax.training.pack_batches import Packing, packs_of_clips, packs_of_latents

CONFIG = WaltConfig(
    dim=16, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)), patch_size=(1, 2, 2), cross_attention=False
)
SHAPES = [(2, 4, 4), (1, 4, 6), (3, 2, 4)]  # of latents; in tokens 2 × 2 × 2, 1 × 2 × 3 and 3 × 1 × 2
COUNTS = [4, 3, 3]
TOKENS, CLIPS = 20, 3


class Clips(list):
    """In the place of `LatentClips`."""

    path = "FOLDER"

    @property
    def sizes(self):
        return np.array([clip.latents.shape[:3] for clip in self])


def clips_of(shape, count, first):
    """Clips whose captions tell their number, from `first` on."""
    latents = np.random.default_rng(first).normal(size=(count, *shape, 2)).astype(np.float32)
    return [Encoded(clip, str(first + number)) for number, clip in enumerate(latents)]


def ids(captions):
    """Two ids a caption; the empty one has zeros."""
    return np.array([(int(caption or 0), 100 * int(caption or 0)) for caption in captions], np.int32)


def read(clips, dropped):
    return ids(["" if without else clip.caption for clip, without in zip(clips, dropped, strict=True)])


CACHED = Clips(
    clip
    for index, (shape, count) in enumerate(zip(SHAPES, COUNTS, strict=True))
    for clip in clips_of(shape, count, 1 + sum(COUNTS[:index]))
)
LATENTS = {int(clip.caption): clip.latents for clip in CACHED}


@pytest.fixture(autouse=True)
def short_queue(monkeypatch):
    monkeypatch.setattr(pack_batches, "WAITING", 4)


def packs(batch_size=2, seed=0):
    return packs_of_latents(CACHED, read, Packing(CONFIG, batch_size, TOKENS, CLIPS, seed))


def taken(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def clip_numbers(batch):
    return batch["text"][..., 0][batch["text"][..., 0] > 0].tolist()


def test_a_segments_tokens_are_one_clips_patches_with_its_caption_and_grid():
    for batch in taken(packs(), 6):
        tokens, text, pack = batch["tokens"], batch["text"], batch["pack"]
        assert tokens.shape == (2, TOKENS, 8)
        assert text.shape == (2, CLIPS, 2)
        for row, segment in np.ndindex(2, CLIPS):
            grid = tuple(pack.sizes[row, segment].tolist())
            own = pack.positions[row, :, 0] == segment
            number = int(text[row, segment, 0])
            if not number:
                assert not own.any()
                assert grid == (0, 0, 0)
                continue
            assert text[row, segment, 1] == 100 * number
            assert own.sum() == np.prod(grid)
            np.testing.assert_array_equal(pack.positions[row, own, 1:], list(np.ndindex(grid)))
            clip = from_tokens(tokens[row, own][None], grid, CONFIG.patch_size)[0]
            np.testing.assert_array_equal(clip, LATENTS[number])
        np.testing.assert_array_equal(tokens[pack.positions[..., 0] < 0], 0)


def test_every_token_of_a_clip_has_a_place_in_each_windows_rows():
    for batch in taken(packs(), 3):
        pack = batch["pack"]
        assert set(pack.groups) == {window.name for window in CONFIG.attention_windows}
        for groups in pack.groups.values():
            placed = groups.place.reshape(2, TOKENS) < groups.slots.shape[1]
            np.testing.assert_array_equal(placed, pack.positions[..., 0] >= 0)


@pytest.mark.parametrize("shards", [1, 2])
def test_batches_have_the_shapes_that_the_stage_has_chosen_whatever_their_clips(shards):
    packing = Packing(CONFIG, 4, TOKENS, CLIPS, 0, shards=shards)
    batches = taken(packs_of_latents(CACHED, read, packing), 8)
    shapes = {str(jax.tree.map(np.shape, batch)) for batch in batches}
    assert len(shapes) == 1 and len({jax.tree.structure(batch) for batch in batches}) == 1
    for leaf in jax.tree.leaves(batches[0]["pack"].groups):
        assert len(leaf) == shards
    other = packs_of_latents(CACHED, read, dataclasses.replace(packing, seed=9))
    assert str(jax.tree.map(np.shape, taken(other, 1)[0])) in shapes


def test_clips_without_room_come_in_the_next_packs_and_are_counted(monkeypatch):
    """Rows for a batch of which others are often more."""
    monkeypatch.setattr(pack_batches, "TRIED", 1)
    batches = taken(packs(), 30)
    assert sum(int(batch["pack"].deferred.sum()) for batch in batches) > 0
    times = collections.Counter(itertools.chain.from_iterable(map(clip_numbers, batches)))
    assert set(times) == set(LATENTS) and max(times.values()) - min(times.values()) <= 2


def test_each_clip_comes_once_an_epoch():
    """With what waits at the end, which is at most four."""
    seen = list(itertools.chain.from_iterable(clip_numbers(batch) for batch in taken(packs(), 12)))
    times = collections.Counter(seen)
    assert set(times) == set(LATENTS)
    assert max(times.values()) - min(times.values()) <= 2
    assert len(seen) > 40


def test_from_a_state_packs_go_on_as_they_were():
    iterator = iter(packs(1))
    for _ in range(5):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(5)]
    other = iter(packs(1))
    other.set_state(json.loads(state))
    for batch in expected:
        again = next(other)
        for name in ("tokens", "text"):
            np.testing.assert_array_equal(again[name], batch[name])
        np.testing.assert_array_equal(again["pack"].positions, batch["pack"].positions)


def test_the_seed_changes_the_order():
    first, again, other = ([clip_numbers(batch) for batch in taken(packs(seed=seed), 4)] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_shape_of_few_clips_among_many_has_its_rows_too():
    """Rows' lengths are chosen from some of the clips; the longest windows must be among them."""
    clips = Clips(clips_of((1, 2, 2), 1025, 1) + clips_of((2, 4, 4), 1, 2000))
    dataset = packs_of_latents(clips, read, Packing(CONFIG, 1, 1034, 1026, 0))
    rows = {name: groups.rows for name, groups in next(iter(dataset))["pack"].groups.items()}
    assert rows["1×all×all"][-1][0] >= 4
    assert rows["all×2×2"][-1][0] >= 8


def test_captions_are_dropped_anew_each_time():
    """At the rate that was asked for, and not always those of the same clips."""
    texts = np.concatenate(
        [
            batch["text"][..., 0][batch["pack"].sizes[..., 0] > 0]
            for batch in taken(packs_of_latents(CACHED, read, Packing(CONFIG, 2, TOKENS, CLIPS, 0, 0.5)), 60)
        ]
    )
    assert 0.35 < (texts == 0).mean() < 0.65
    assert set(texts) == {0, *LATENTS}
    dense = Clips(CACHED[:4])
    texts = np.concatenate(
        [batch["text"][:, 0] for batch in taken(dense_batches(dense, read, 0.5, {SHAPES[0]: 4}, seed=0), 40)]
    )
    assert 0.35 < (texts == 0).mean() < 0.65
    assert set(texts) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("drop", "left"),
    [
        (DropConfig(rate=0.5), (0.5, 0.5)),  # of 8, 6 and 6 tokens
        (DropConfig(kind="beta", rate=0.4), (0.45, 0.75)),
        (DropConfig(kind="resolution", rate=0.5, slope=0.3), (0.2, 0.35)),  # the rates are 0.8, 0.65 and 0.65
    ],
)
def test_what_is_left_of_a_clip_are_its_own_tokens_at_their_places(drop, left):
    dataset = packs_of_latents(CACHED, read, Packing(CONFIG, 2, TOKENS, CLIPS, 0, drop=drop))
    seen, all_of_them = 0, 0
    for batch in taken(dataset, 12):
        pack = batch["pack"]
        for row, segment in np.ndindex(2, CLIPS):
            number = int(batch["text"][row, segment, 0])
            if not number:
                continue
            own = pack.positions[row, :, 0] == segment
            t, y, x = pack.positions[row, own, 1:].T
            grid = CONFIG.grid(LATENTS[number].shape[:3])
            assert tuple(pack.sizes[row, segment]) == grid
            every = to_tokens(LATENTS[number][None], CONFIG.patch_size)[0]
            raster = np.ravel_multi_index((t, y, x), grid)
            assert (np.diff(raster) > 0).all()
            np.testing.assert_array_equal(batch["tokens"][row, own], every[raster])
            seen += len(raster)
            all_of_them += len(every)
    assert left[0] <= seen / all_of_them <= left[1]


def test_groups_of_frames_are_whole_frames_at_their_places_in_the_long_clip():
    clips, seen, spans = Clips(clips_of((7, 4, 2), 6, 1)), [], set()
    packing = Packing(CONFIG, 2, TOKENS, CLIPS, 0, frames=3)  # of 2 tokens
    for batch in taken(packs_of_latents(clips, read, packing), 12):
        pack, observed = batch["pack"], batch["observed"][..., 0]
        assert not observed[pack.positions[..., 0] < 0].any()
        for row, segment in np.ndindex(2, CLIPS):
            number, own = int(batch["text"][row, segment, 0]), pack.positions[row, :, 0] == segment
            if not number:
                continue
            assert tuple(pack.sizes[row, segment]) == (7, 2, 1)
            t, y, _ = pack.positions[row, own, 1:].T
            frames = t[::2]
            assert (t.reshape(-1, 2) == frames[:, None]).all() and (y.reshape(-1, 2) == [0, 1]).all()
            assert 1 <= len(frames) <= 3 and (np.diff(frames) > 0).all()
            every = to_tokens(clips[number - 1].latents[None, frames], CONFIG.patch_size)[0]
            np.testing.assert_array_equal(batch["tokens"][row, own], every)
            given = observed[row, own].reshape(-1, 2)
            assert (given[:, 0] == given[:, 1]).all() and not given.all()
            seen.append(given.mean())
            spans.add(int(frames[-1] - frames[0]))
    assert np.mean(seen) > 0.1 and len(spans) >= 5


def test_with_tokens_dropped_packs_go_on_from_a_state():
    def fresh():
        drop = DropConfig(kind="beta", rate=0.5)
        return iter(packs_of_latents(CACHED, read, Packing(CONFIG, 1, TOKENS, CLIPS, 0, 0.3, drop)))

    iterator = fresh()
    for _ in range(3):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(4)]
    other = fresh()
    other.set_state(json.loads(state))
    for batch in expected:
        again = next(other)
        for name in ("tokens", "text"):
            np.testing.assert_array_equal(again[name], batch[name])
        np.testing.assert_array_equal(again["pack"].positions, batch["pack"].positions)


def test_batches_of_one_size_have_each_clip_once_an_epoch():
    clips = Clips(CACHED[:4])
    seen = np.concatenate(
        [batch["text"][:, 0] for batch in taken(dense_batches(clips, read, 0.0, {SHAPES[0]: 2}, seed=3), 6)]
    )
    for epoch in seen.reshape(3, 4):
        assert sorted(epoch) == [1, 2, 3, 4]
    (batch,) = taken(dense_batches(clips, read, 0.0, {SHAPES[0]: 4}, seed=3), 1)
    for latents, text in zip(batch["latents"], batch["text"], strict=True):
        np.testing.assert_array_equal(latents, LATENTS[text[0]])


def test_batches_of_several_sizes_have_one_each_and_each_clip_once_an_epoch():
    """Two large clips a batch, or three of either of the others; of the large ones each is in two batches an epoch."""
    sizes = dict(zip(SHAPES, (2, 3, 3), strict=True))
    seen = collections.Counter()
    batches = taken(dense_batches(CACHED, read, 0.0, sizes, seed=0), 8)
    for batch in batches:
        shape = batch["latents"].shape
        assert shape[0] == sizes[shape[1:4]] == len(batch["text"])
        for latents, text in zip(batch["latents"], batch["text"], strict=True):
            np.testing.assert_array_equal(latents, LATENTS[text[0]])
            seen[int(text[0])] += 1
    assert {batch["latents"].shape[1:4] for batch in batches} == set(SHAPES)
    assert set(seen) == set(LATENTS) and max(seen.values()) - min(seen.values()) <= 1


def test_with_several_sizes_batches_go_on_from_a_state():
    iterator = iter(dense_batches(CACHED, read, 0.3, dict.fromkeys(SHAPES, 2), seed=0))
    for _ in range(3):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(4)]
    other = iter(dense_batches(CACHED, read, 0.3, dict.fromkeys(SHAPES, 2), seed=0))
    other.set_state(json.loads(state))
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(other), batch)


class Videos:
    """Videos whose two frames of noise are what the latents of `CACHED` are made of, in the same order."""

    def __init__(self, seed, unusable=()):
        self.order, self.unusable = Order([len(CACHED)], [1.0], seed), unusable

    def kind(self, number):
        return 0, *CACHED[self.order[number].index].latents.shape[:3]

    def __getitem__(self, number):
        clip = CACHED[self.order[number].index]
        if clip.caption in self.unusable:
            return None
        return {"number": number, "video": clip.latents, "text": clip.caption}


@pytest.mark.parametrize("drop", [None, DropConfig(kind="resolution", rate=0.5, slope=0.3)])
def test_packs_that_are_encoded_each_time_equal_those_of_latents(drop):
    """To the last bit, with captions and tokens dropped alike; and again from a state."""
    packing = Packing(CONFIG, 2, TOKENS, CLIPS, 5, 0.3, drop)
    encoded = []

    def encode(clips):
        encoded.append(len(clips))
        return [Encoded(clip["video"], clip["text"]) for clip in clips]

    def packs_of_videos():
        sizes = dict.fromkeys(SHAPES, 1.0)
        return iter(packs_of_clips(Videos(5), lambda size: size, sizes, encode, 2, read, packing))

    ours, state = packs_of_videos(), None
    for number, batch in enumerate(taken(packs_of_latents(CACHED, read, packing), 6)):
        if number == 3:
            state = json.dumps(ours.get_state())
            ours = packs_of_videos()
            ours.set_state(json.loads(state))
        other = next(ours)
        for name in ("tokens", "text"):
            np.testing.assert_array_equal(other[name], batch[name])
        for name in ("positions", "sizes"):
            np.testing.assert_array_equal(getattr(other["pack"], name), getattr(batch["pack"], name))
        assert encoded[-1] == (batch["pack"].sizes[..., 0] > 0).sum()


def test_videos_that_cannot_be_used_are_in_no_pack():
    packing, left_out = Packing(CONFIG, 2, TOKENS, CLIPS, 0), ("2", "7")
    packs = packs_of_clips(
        Videos(0, left_out),
        lambda size: size,
        dict.fromkeys(SHAPES, 1.0),
        lambda clips: [Encoded(clip["video"], clip["text"]) for clip in clips],
        2,
        read,
        packing,
    )
    seen = set(itertools.chain.from_iterable(map(clip_numbers, taken(packs, 8))))
    assert seen == set(LATENTS) - set(map(int, left_out))


PARTS = [[(0, 1), (2, 3)], [(0, 3), (1, 2)], [(0,), (1,), (2,), (3,)]]


@pytest.mark.parametrize("parts", PARTS)
def test_batches_of_latents_are_the_same_for_any_number_of_processes(parts):
    """Of which there may be more than clips."""

    def batches(part=WHOLE):
        return dense_batches(Clips(CACHED[:5]), read, 0.3, dict.fromkeys(SHAPES, 4), 0, part)

    whole = taken(batches(), 6)
    for shards in parts:
        part = Part(shards, 4)
        for batch, mine in zip(whole, taken(batches(part), 6), strict=True):
            jax.tree.map(lambda a, b, part=part: np.testing.assert_array_equal(a[part.rows(4)], b), batch, mine)


@pytest.mark.parametrize("packers", [1, 4])
@pytest.mark.parametrize("parts", PARTS)
def test_packs_are_the_same_for_any_number_of_processes_and_restarts(parts, packers, monkeypatch):
    """With tokens dropped and clips deferred; from the middle on from the states that the processes have together."""
    monkeypatch.setattr(pack_batches, "TRIED", 1)
    packing = Packing(CONFIG, 8, TOKENS, CLIPS, 5, 0.3, DropConfig(kind="beta", rate=0.3), shards=4, packers=packers)
    whole = taken(packs_of_latents(CACHED, read, packing), 6)
    processes = [dataclasses.replace(packing, part=Part(shards, 4)) for shards in parts]
    iterators = [iter(packs_of_latents(CACHED, read, process)) for process in processes]
    for step, batch in enumerate(whole):
        if step == 3:
            state = merged([json.loads(json.dumps(iterator.get_state())) for iterator in iterators])
            iterators = [iter(packs_of_latents(CACHED, read, process)) for process in processes]
            for iterator in iterators:
                iterator.set_state(state)
        for iterator, process in zip(iterators, processes, strict=True):
            mine = next(iterator)
            jax.tree.map(
                lambda a, b, part=process.part: np.testing.assert_array_equal(a[part.rows(len(a))], b), batch, mine
            )


def test_clips_that_suit_neither_are_refused():
    with pytest.raises(UserError, match=r"latents of 1 × 4 × 6, but the stage's clips have 2 × 4 × 4; give the stage"):
        dense_batches(CACHED, read, 0.0, {SHAPES[0]: 2}, seed=0)
    with pytest.raises(UserError, match=r"clips of 8 tokens, which overflow packs of 7"):
        packs_of_latents(CACHED, read, Packing(CONFIG, 1, 7, CLIPS, 0))


def test_clips_are_encoded_together_with_their_like_and_come_in_their_order():
    calls = []

    def encode(video):
        assert len(video) == latent_batches.ENCODED_AT_ONCE
        calls.append(video.shape)
        return video[:, :, ::2, :1, :2].astype(np.float32) + np.array([0.5, 100], np.float32)

    def clip(number):
        height = 2 + 2 * (number % 3 == 0)
        return {"number": number, "video": np.full((1, height, 2, 3), number, np.uint8), "text": f"clip {number}"}

    numbers = [number for number in range(22) if number != 5]  # one that could not be used
    reported = []
    found = list(encoded_clips(encode, map(clip, numbers), reported.append))
    assert sum(reported) == len(numbers)
    assert len(calls) == 3  # 13 small ones in two batches, 8 large ones in one
    assert [encoded.caption for encoded in found] == [f"clip {number}" for number in numbers]
    for number, encoded in zip(numbers, found, strict=True):
        assert encoded.latents.shape == (1, 1 + (number % 3 == 0), 1, 2)
        np.testing.assert_array_equal(encoded.latents[0, -1, 0], [number + 0.5, number + 100])


def test_few_clips_are_encoded_in_batches_of_powers_of_two():
    calls = []

    def encode(video):
        calls.append(len(video))
        return video[..., :1].astype(np.float32)

    clips = [{"number": number, "video": np.full((1, 2, 2, 3), number), "text": ""} for number in range(13)]
    found = list(encoded_clips(encode, clips, lambda count: None, smallest=1))
    assert calls == [8, 8]  # five are padded to eight
    assert [clip.latents[0, 0, 0, 0] for clip in found] == list(range(13))
    calls.clear()
    list(encoded_clips(encode, clips[:3], lambda count: None, smallest=1))
    list(encoded_clips(encode, clips[:1], lambda count: None, smallest=1))
    assert calls == [4, 1]
    calls.clear()
    assert len(list(encoded_clips(encode, clips[:9], lambda count: None, smallest=1, devices=4))) == 9
    assert calls == [16]  # three of a device are padded to four


def test_stages_have_a_folder_each(tmp_path):
    assert latents_path(tmp_path, "short") != latents_path(tmp_path, "long")
    assert tmp_path in latents_path(tmp_path, "short").parents
