"""Long videos by a schedule: its table is what the model gets; windows without gaps are as they always were."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_generator import make

from walt_jax.denoiser.model import Denoiser
from walt_jax.errors import UserError
from walt_jax.generation import by_schedule
from walt_jax.generation.codec import Codec
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion
from walt_jax.generation.long_video import segments
from walt_jax.generation.request import Given, Request
from walt_jax.generation.schedules import Lengths, schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

CALL, TOTAL = 4, 11
SIZE = (1 + 4 * (TOTAL - 1), 16, 16)
NAMES = ["autoreg", "long-range", "hierarchy-2", "hierarchy-3", "hierarchy-5", "adaptive-autoreg"]
NAMES += ["adaptive-hierarchy-2"]


@pytest.fixture(scope="module")
def generator():
    """Makes 4 latent frames at once, of clips of 11."""
    whole = make(windows=((1, None, None), (None, 1, 1)))
    model = whole.model
    grid = (TOTAL, *model.denoiser.bounds[1:])
    model = dataclasses.replace(
        model, denoiser=Denoiser(model.denoiser.config, grid), latent_shape=(TOTAL, *model.latent_shape[1:])
    )
    return dataclasses.replace(whole, model=model, packed=True, call=CALL)


def given_start(generator, count):
    """The first frames are given, and the rest is not."""
    shape = generator.shape(SIZE)
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    until = np.full((*shape[:3], 1), NEVER, np.float32)
    until[:count] = 0
    return Given(latents, until)


def by_position(requests):
    """A model whose output depends on nothing but where a frame is; frames that are given come back."""
    found = []
    for request in requests:
        frames = np.array(request.frames, np.float32)[:, None, None, None]
        shape = request.given.latents.shape
        made = np.broadcast_to(np.sin(frames) + request.size[1], shape)
        found.append(np.where(request.given.until == 0, request.given.latents, made).astype(np.float32))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 3])
def test_calls_have_the_tables_frames_and_make_the_whole_video(generator, name, start):
    shape = generator.shape(SIZE)
    given = given_start(generator, start) if start else None
    requests = [Request("a", 1, size=SIZE, given=given)]
    asked = []

    def spy(some):
        asked.extend(some)
        return by_position(some)

    [video] = by_schedule.whole(spy, requests, shape, CALL, name)
    lengths = Lengths(TOTAL, start, CALL, CALL - by_schedule.observed_frames(CALL))
    table = list(schedule(name, lengths, lambda frame: video[frame].reshape(-1)))
    assert [sorted({*stage.observed, *stage.made}) for stage in table] == [list(one.frames) for one in asked]
    for stage, one in zip(table, asked, strict=True):
        observed = [f for f, u in zip(one.frames, one.given.until, strict=True) if (u == 0).all()]
        assert observed == sorted(set(stage.observed))
        for frame, latents in zip(one.frames, one.given.latents, strict=True):
            if frame in observed:
                np.testing.assert_array_equal(latents, video[frame])
    assert len({one.seed for one in asked}) == len(asked)
    places = np.arange(TOTAL, dtype=np.float32)[:, None, None, None]
    expected = np.broadcast_to(np.sin(places) + SIZE[1], shape).copy()
    if start:
        expected[:start] = given.latents[:start]
    np.testing.assert_array_equal(video, expected)


def test_the_model_sees_these_frames_at_their_places(generator, monkeypatch):
    """Positions, the clip's size and the mask of what is observed, as the denoiser gets them."""
    seen = []
    plain = LatentDiffusion.sample_tokens

    def spy(self, params, noise, asked, *more):
        positions = asked.layout.pack.positions[0]
        there = positions[:, 0] == 0
        known = positions[there & (np.asarray(asked.until)[0, :, 0] == 0), 1]
        seen.append((set(positions[there, 1].tolist()), set(known.tolist()), asked.layout.pack.sizes[0, 0].tolist()))
        return plain(self, params, noise, asked, *more)

    monkeypatch.setattr(LatentDiffusion, "sample_tokens", spy)
    [video] = generator.following("hierarchy-2").latents([Request("a", 1, size=SIZE)])
    assert video.shape == generator.shape(SIZE) and np.isfinite(video).all() and np.abs(video).min(axis=(1, 2, 3)).all()
    table = list(schedule("hierarchy-2", Lengths(TOTAL, 0, CALL, CALL - by_schedule.observed_frames(CALL))))
    assert [({*stage.observed, *stage.made}, set(stage.observed)) for stage in table] == [one[:2] for one in seen]
    assert all(size[0] == TOTAL for *_, size in seen)
    near, far = ([Request("a", 1, size=SIZE, frames=frames)] for frames in ((0, 1, 2), (0, 4, 9)))
    assert np.abs(generator.latents(near)[0] - generator.latents(far)[0]).max() > 1e-3


def test_autoreg_is_what_windows_are(monkeypatch):
    """Where the model knows distances only, and a window's first frame is that before it as it is."""
    plain = make(positions="none", windows=((1, None, None), (None, 1, 1)))  # 3 latent frames at once
    size = (1 + 4 * 5, 16, 16)
    model = dataclasses.replace(plain.model, denoiser=Denoiser(plain.model.denoiser.config, (6, 1, 1)))
    gaps = dataclasses.replace(plain, model=model, packed=True, call=3)
    made = []

    def encode(self, trained, video, cache=None):
        return made[-2][None, :1], None  # of two handed on, the frame before the last

    decode = Codec.decode

    def watched(self, trained, latents, cache=None):
        made.extend(np.asarray(latents)[0, :, None])
        return decode(self, trained, latents, cache)

    request = Request("a", 5, size=size)
    [by_calls] = gaps.latents([request])
    frames = [one.frames for one in segments(gaps, request)]
    monkeypatch.setattr(Codec, "encode", encode)
    monkeypatch.setattr(Codec, "decode", watched)
    found = list(segments(plain, request))
    by_windows = np.concatenate([one.latents for one in found])
    np.testing.assert_allclose(by_calls, by_windows, atol=2e-3, rtol=1e-3)
    difference = np.concatenate(frames).astype(int) - np.concatenate([one.frames for one in found])
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("name", ["hierarchy-2", "autoreg"])
def test_frames_come_in_order_and_latents_before_they_are_decoded(generator, name):
    """And stopping early has kept all that was made."""
    kept = {}
    made = segments(
        generator.following(name),
        Request("a", 1, size=SIZE),
        keep=lambda frames, latents: kept.update(zip(frames, latents, strict=True)),
    )
    first = list(itertools.islice(made, 3))
    assert {0, 1, 2} <= set(kept)
    assert (TOTAL - 1 in kept) == name.startswith("hierarchy")  # a key frame
    found = [*first, *made]
    latents = np.concatenate([one.latents for one in found])
    np.testing.assert_array_equal(latents, np.stack([kept[frame] for frame in range(TOTAL)]))
    frames = np.concatenate([one.frames for one in found])
    whole = np.asarray(generator.model.codec.decode(generator.tokenizer, latents[None])[0][0])
    assert frames.shape == (*SIZE, 3) and np.abs(whole.astype(int) - frames).max() <= 1
    [at_once] = generator.following(name).latents([Request("a", 1, size=SIZE)])
    np.testing.assert_allclose(latents, at_once, atol=2e-4, rtol=1e-4)


def test_latents_are_held_as_long_as_a_later_call_observes_them():
    """Of autoreg a call's, however long the video is."""
    held = []

    def sample(some):
        held.append(len(some[0].frames))
        return by_position(some)

    request = Request("a", 1, size=(1, 8, 8))
    made = by_schedule.calls(sample, [request], (400, 1, 1, 2), CALL, "autoreg")
    most = max(len(made.gi_frame.f_locals["held"][0]) for _ in made)
    assert most <= CALL and len(held) == 199


def test_several_videos_give_what_each_gives_alone(generator):
    requests = [Request("ab"[number], number, size=SIZE) for number in range(2)] + [Request("c", 3, size=(9, 16, 16))]
    for request, latents in zip(requests, generator.latents(requests), strict=True):
        np.testing.assert_allclose(latents, generator.latents([request])[0], atol=2e-4, rtol=1e-4)


def test_what_can_not_be_is_said(generator):
    with pytest.raises(UserError, match="trained on whole clips"):
        dataclasses.replace(generator, call=0).following("hierarchy-2")
    with pytest.raises(UserError, match="is no schedule"):
        generator.following("hierarchy")
    with pytest.raises(UserError, match="clips of up to 41, and 45"):
        generator.shape((45, 16, 16))
    noisy = dataclasses.replace(generator, config=dataclasses.replace(generator.config, sampler="ddpm"))
    with pytest.raises(UserError, match="not for packs"):
        noisy.latents([Request("a", 1, size=SIZE)])
