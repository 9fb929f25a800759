"""Encoded clips are kept whole or not at all; packs hold them as they are, with their captions, once an epoch."""

import collections
import itertools
import json

import numpy as np
import pytest

from walt_jax.denoiser.layout import from_tokens
from walt_jax.denoiser.model import DenoiserConfig
from walt_jax.training import latent_cache
from walt_jax.training.latent_cache import cached_batches, encode_clips, latents_path, packed_batches

CONFIG = DenoiserConfig(
    dim=16, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)), patch_size=(1, 2, 2), cross_attention=False
)
SHAPES = [(2, 4, 4), (1, 4, 6), (3, 2, 4)]  # of latents; in tokens 2 × 2 × 2, 1 × 2 × 3 and 3 × 1 × 2
COUNTS = [4, 3, 3]
TOKENS, CLIPS = 20, 3


def arrays_of(shape, count, first):
    """Clips whose caption ids tell their number, from `first` on."""
    numbers = np.arange(first, first + count, dtype=np.int32)
    latents = np.random.default_rng(first).normal(size=(count, *shape, 2)).astype(np.float32)
    return {"latents": latents, "text": np.stack([numbers, 100 * numbers], axis=1)}


CACHED = [
    arrays_of(shape, count, 1 + sum(COUNTS[:index]))
    for index, (shape, count) in enumerate(zip(SHAPES, COUNTS, strict=True))
]
LATENTS = {int(text[0]): clip for arrays in CACHED for clip, text in zip(*arrays.values(), strict=True)}


@pytest.fixture(autouse=True)
def short_queue(monkeypatch):
    monkeypatch.setattr(latent_cache, "WAITING", 4)


def packs(batch_size=2, seed=0):
    return packed_batches(CACHED, CONFIG, batch_size, TOKENS, CLIPS, seed)


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
    shapes = [arrays_of((1, 2, 2), 1025, 1), arrays_of((2, 4, 4), 1, 2000)]
    dataset = packed_batches(shapes, CONFIG, 1, 1034, 1026, seed=0)
    lengths = {name: groups.lengths for name, groups in next(iter(dataset))["pack"].groups.items()}
    assert lengths["1×all×all"][-1] >= 4
    assert lengths["all×2×2"][-1] >= 8


def test_batches_of_one_size_have_each_row_once_an_epoch():
    arrays = CACHED[0]
    seen = np.concatenate([batch["text"][:, 0] for batch in taken(cached_batches(arrays, 2, seed=3), 6)])
    for epoch in seen.reshape(3, 4):
        assert sorted(epoch) == [1, 2, 3, 4]
    (batch,) = taken(cached_batches(arrays, 4, seed=3), 1)
    for latents, text in zip(batch["latents"], batch["text"], strict=True):
        np.testing.assert_array_equal(latents, LATENTS[text[0]])


class Source:
    """Clips of two sizes whose pixels are their number, and how many have been encoded."""

    def __init__(self):
        self.encoded = 0

    def __call__(self):
        for number in range(21):
            height = 2 + 2 * (number % 3 == 0)
            video = np.full((1, height, 2, 3), number, np.uint8)
            yield {"video": video, "text": np.array([number], np.int32)}

    def encode(self, video):
        assert len(video) == latent_cache.ENCODED_AT_ONCE
        self.encoded += len(video)
        return video[:, :, ::2, :1, :2].astype(np.float32) + np.array([0.5, 100], np.float32)


def test_clips_are_encoded_once_and_read_afterwards(tmp_path):
    path, source = latents_path(tmp_path, "denoiser"), Source()
    large, small = sorted(encode_clips(path, source.encode, source, 21), key=lambda arrays: len(arrays["text"]))
    assert source.encoded == 3 * latent_cache.ENCODED_AT_ONCE  # 14 small ones in two batches, 7 large ones in one
    np.testing.assert_array_equal(large["text"], np.arange(0, 21, 3)[:, None])
    np.testing.assert_array_equal(small["text"][:, 0], [number for number in range(21) if number % 3])
    assert large["latents"].shape == (7, 1, 2, 1, 2) and small["latents"].shape == (14, 1, 1, 1, 2)
    for arrays in (large, small):
        np.testing.assert_array_equal(arrays["latents"][:, 0, -1, 0], arrays["text"] + np.array([[0.5, 100]]))
        assert arrays["latents"].dtype == np.float32 and arrays["text"].dtype == np.int32
    again = sorted(encode_clips(path, source.encode, source, 21), key=lambda arrays: len(arrays["text"]))
    assert source.encoded == 3 * latent_cache.ENCODED_AT_ONCE
    for one, other in zip((large, small), again, strict=True):
        assert set(one) == set(other) == {"latents", "text"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_an_interrupted_encoding_leaves_nothing(tmp_path):
    path, source = latents_path(tmp_path, "denoiser"), Source()

    def interrupted(video):
        if source.encoded >= 8:
            raise KeyboardInterrupt
        return source.encode(video)

    with pytest.raises(KeyboardInterrupt):
        encode_clips(path, interrupted, source, 21)
    assert not path.exists()
    assert sum(len(arrays["text"]) for arrays in encode_clips(path, source.encode, source, 21)) == 21


def test_stages_have_a_file_each(tmp_path):
    assert latents_path(tmp_path, "short") != latents_path(tmp_path, "long")
    assert tmp_path in latents_path(tmp_path, "short").parents
