"""Clips are encoded in turn; packs hold them as they are, with their captions, once an epoch."""

import collections
import itertools
import json

import numpy as np
import pytest
import tqdm

from walt_jax.data.dropping import DropConfig
from walt_jax.data.latents import Encoded
from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import from_tokens, to_tokens
from walt_jax.errors import UserError
from walt_jax.training import latent_batches
from walt_jax.training.latent_batches import dense_batches, encoded_clips, latents_path, packed_batches

CONFIG = DenoiserConfig(
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


def read(clip, dropped):
    return ids(["" if dropped else clip.caption])[0]


CACHED = Clips(
    clip
    for index, (shape, count) in enumerate(zip(SHAPES, COUNTS, strict=True))
    for clip in clips_of(shape, count, 1 + sum(COUNTS[:index]))
)
LATENTS = {int(clip.caption): clip.latents for clip in CACHED}


@pytest.fixture(autouse=True)
def short_queue(monkeypatch):
    monkeypatch.setattr(latent_batches, "WAITING", 4)


def packs(batch_size=2, seed=0):
    return packed_batches(CACHED, read, 0.0, CONFIG, batch_size, TOKENS, CLIPS, seed)


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
            placed = groups.place.reshape(2, TOKENS) < groups.slots.size
            np.testing.assert_array_equal(placed, pack.positions[..., 0] >= 0)


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
    dataset = packed_batches(clips, read, 0.0, CONFIG, 1, 1034, 1026, seed=0)
    lengths = {name: groups.lengths for name, groups in next(iter(dataset))["pack"].groups.items()}
    assert lengths["1×all×all"][-1] >= 4
    assert lengths["all×2×2"][-1] >= 8


def test_captions_are_dropped_anew_each_time():
    """At the rate that was asked for, and not always those of the same clips."""
    texts = np.concatenate(
        [
            batch["text"][..., 0][batch["pack"].sizes[..., 0] > 0]
            for batch in taken(packed_batches(CACHED, read, 0.5, CONFIG, 2, TOKENS, CLIPS, seed=0), 60)
        ]
    )
    assert 0.35 < (texts == 0).mean() < 0.65
    assert set(texts) == {0, *LATENTS}
    dense = Clips(CACHED[:4])
    texts = np.concatenate([batch["text"][:, 0] for batch in taken(dense_batches(dense, read, 0.5, 4, seed=0), 40)])
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
    dataset = packed_batches(CACHED, read, 0.0, CONFIG, 2, TOKENS, CLIPS, 0, drop)
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


def test_with_tokens_dropped_packs_go_on_from_a_state():
    def fresh():
        drop = DropConfig(kind="beta", rate=0.5)
        return iter(packed_batches(CACHED, read, 0.3, CONFIG, 1, TOKENS, CLIPS, 0, drop))

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
    seen = np.concatenate([batch["text"][:, 0] for batch in taken(dense_batches(clips, read, 0.0, 2, seed=3), 6)])
    for epoch in seen.reshape(3, 4):
        assert sorted(epoch) == [1, 2, 3, 4]
    (batch,) = taken(dense_batches(clips, read, 0.0, 4, seed=3), 1)
    for latents, text in zip(batch["latents"], batch["text"], strict=True):
        np.testing.assert_array_equal(latents, LATENTS[text[0]])


def test_clips_that_suit_neither_are_refused():
    with pytest.raises(UserError, match=r"latents of 3 sizes, from 1 × 4 × 6 to 3 × 2 × 4; give their stage shapes"):
        dense_batches(CACHED, read, 0.0, 2, seed=0)
    with pytest.raises(UserError, match=r"clips of 8 tokens, which overflow packs of 7"):
        packed_batches(CACHED, read, 0.0, CONFIG, 1, 7, CLIPS, seed=0)


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
    with tqdm.tqdm(disable=True) as told:
        found = list(encoded_clips(encode, map(clip, numbers), told))
    assert len(calls) == 3  # 13 small ones in two batches, 8 large ones in one
    assert [encoded.caption for encoded in found] == [f"clip {number}" for number in numbers]
    for number, encoded in zip(numbers, found, strict=True):
        assert encoded.latents.shape == (1, 1 + (number % 3 == 0), 1, 2)
        np.testing.assert_array_equal(encoded.latents[0, -1, 0], [number + 0.5, number + 100])


def test_stages_have_a_folder_each(tmp_path):
    assert latents_path(tmp_path, "short") != latents_path(tmp_path, "long")
    assert tmp_path in latents_path(tmp_path, "short").parents
