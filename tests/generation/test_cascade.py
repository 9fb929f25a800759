"""A long video through a cascade is what each stage gives of the whole video before it, in memory for a window."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from small_generator import filled, make

from walt_jax.denoiser.model import Denoiser
from walt_jax.errors import UserError
from walt_jax.generation import cascade
from walt_jax.generation.asking import encoded
from walt_jax.generation.by_schedule import observed_frames, seed_of_call
from walt_jax.generation.cascade import LowResWindows, encoded_again, upscaled, upscaled_segments, upscaled_size
from walt_jax.generation.latent_diffusion import NEVER, unboxed
from walt_jax.generation.long_video import Segment, Window, keep_nothing, segments, windows
from walt_jax.generation.low_res import LowRes
from walt_jax.generation.request import Given, Request

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE = (21, 16, 16)
TOTAL, CALL = 6, 3
REQUEST = Request("a", 5, size=SIZE)


@pytest.fixture(scope="module")
def base():
    generator = make()
    return dataclasses.replace(generator, config=dataclasses.replace(generator.config, batch_size=1))


@pytest.fixture(scope="module")
def stage(base):
    """Upscales the base's videos of 9 × 16 × 16 to twice that size; the tokenizer is the base's."""
    model = base.model
    config = dataclasses.replace(model.denoiser.config, upscale=2, frame_prediction=False)
    t, h, w, c = model.latent_shape
    model = dataclasses.replace(
        model, denoiser=Denoiser(config, config.grid((t, 2 * h, 2 * w))), latent_shape=(t, 2 * h, 2 * w, c)
    )
    params = filled(unboxed(jax.eval_shape(model.init, jax.random.key(0))))
    low_res = LowRes(base.model.codec, base.tokenizer, 2)
    return dataclasses.replace(base, model=model, params=params, low_res=low_res)


def joined(found):
    return (np.concatenate([getattr(one, part) for one in found]) for part in ("latents", "frames"))


def test_a_long_video_is_what_the_stages_give_by_hand(base, stage):
    """Base first, all of it; then the upscaler's windows one by one, on all latents of the base."""
    kept = {}
    found = upscaled_segments(base, [stage], REQUEST, lambda at, made: kept.update(zip(at, made, strict=True)))
    latents, frames = joined(list(found))
    assert frames.shape == (21, 32, 32, 3) and latents.shape == stage.shape((21, 32, 32))
    np.testing.assert_array_equal(latents, np.stack([kept[frame] for frame in range(TOTAL)]))
    whole = np.asarray(stage.model.codec.decode(stage.tokenizer, latents[None])[0][0])
    assert np.abs(whole.astype(int) - frames).max() <= 1
    low, low_frames = joined(list(segments(base, REQUEST)))
    made = np.zeros((0, *latents.shape[1:]), np.float32)
    for number, window in enumerate(windows(TOTAL, CALL, observed_frames(CALL))):
        low_res = low[window.start : window.stop].copy()
        given = np.zeros((CALL, *latents.shape[1:]), np.float32)
        until = np.full((CALL, *latents.shape[1:3], 1), NEVER, np.float32)
        if number:
            low_res[0] = encoded(base.model.codec, base.tokenizer, low_frames[4 * window.start][None])[0]
            given[0] = encoded(stage.model.codec, stage.tokenizer, frames[4 * window.start][None])[0]
            given[1 : window.done] = made[window.start + 1 :]
            until[: window.done] = 0
        seed = seed_of_call(5, number) if number else 5
        [out] = stage.latents([Request("a", seed, size=(9, 32, 32), given=Given(given, until), low_res=low_res)])
        made = np.concatenate([made, out[window.done :]])
    np.testing.assert_allclose(latents, made, atol=2e-3, rtol=1e-3)
    short = dataclasses.replace(REQUEST, size=(9, 16, 16))
    [first] = upscaled(base, [stage], [short], base.latents([short]))
    np.testing.assert_allclose(latents[:CALL], first, atol=2e-3, rtol=1e-3)
    assert np.abs(low_res).max() > 0 and np.abs(np.diff(latents, axis=0)).max() > 1e-3


def test_windows_are_read_as_they_are_needed_and_forgotten(base):
    """However long the video is."""
    made = []

    def video():
        for frame in range(300):
            made.append(frame)
            yield Segment(np.full((1, 4, 4, 2), frame, np.float32), np.zeros((4 if frame else 1, 16, 16, 3), np.uint8))

    low_res = LowRes(base.model.codec, base.tokenizer, 2)
    low_res = dataclasses.replace(low_res, codec=_Numbered())
    of_window = LowResWindows(low_res, video())
    for window in windows(300, 5, 2):
        latents = of_window(window)
        expected = np.arange(window.start, window.stop)
        assert latents[1:, 0, 0, 0].tolist() == expected[1:].tolist()
        assert latents[0, 0, 0, 0] == (-1 if window.start else 0)  # encoded as a picture, but for the first
        assert len(made) == window.stop and len(of_window._held) <= 5
    assert len(made) == 300


class _Numbered:
    """A codec that encodes pictures to -1."""

    tokenizer = types.SimpleNamespace(config=types.SimpleNamespace(strides=(4, 4, 4)))

    def encode(self, tokenizer, video, cache=None):
        assert video.shape == (1, 1, 16, 16, 3)
        return np.full((1, 1, 4, 4, 2), -1, np.float32), None


def test_frames_of_another_tokenizer_are_encoded_as_a_whole_video_is(base):
    video = np.random.default_rng(0).integers(0, 255, (21, 16, 16, 3), np.uint8)
    low_res = LowRes(base.model.codec, base.tokenizer, 2)
    parts = [Segment(np.zeros(0), video[:9]), Segment(np.zeros(0), video[9:13]), Segment(np.zeros(0), video[13:])]
    latents, frames = joined(list(encoded_again(low_res, iter(parts))))
    np.testing.assert_array_equal(frames, video)
    np.testing.assert_allclose(latents, encoded(base.model.codec, base.tokenizer, video), atol=1e-4)


def test_what_can_not_be_upscaled_is_said(base, stage):
    assert upscaled_size(SIZE, [stage]) == (21, 32, 32)
    assert cascade.is_long(base, [stage], SIZE) and not cascade.is_long(base, [stage], (9, 16, 16))
    with pytest.raises(UserError, match="Run 1 of the cascade does not upscale"):
        upscaled_segments(base, [base], REQUEST, keep_nothing)
    with pytest.raises(UserError, match="videos of 9 frames and more; leave --num_frames out, or give as many"):
        upscaled_size((5, 16, 16), [stage])
    assert windows(3, 3, 2) == [Window(0, 0, 3)]
