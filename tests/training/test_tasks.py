"""The denoiser's task: packs give the clips' gradients, what is given is not learned, low resolution is the clip's."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.denoiser.layout import PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion import objective
from walt_jax.diffusion.adaptive import adapted_time, complexity
from walt_jax.diffusion.objective import Binned, DiffusionConfig
from walt_jax.diffusion.schedule import Schedule
from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.generation.latent_diffusion import LatentDiffusion
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.training import tasks
from walt_jax.training.tasks import ConditioningConfig, DenoiserTask, rectangles

CODEC = Codec(Tokenizer(TokenizerConfig(2, 4, (1,), (), 1, 4, patch_size=2, taps=1)))
CONFIG = WaltConfig(
    dim=16, heads=2, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary",
    cross_attention=False, classes=4,
)  # fmt: skip
VIDEO, IMAGE = (3, 2, 2), (1, 2, 2)
CHANNELS, CLASSES = 2, 4


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_of(config, shape, diffusion, kind=LatentDiffusion):
    return kind(CODEC, None, Denoiser(config, config.grid(VIDEO)), diffusion, (*shape, CHANNELS))


def filled(model):
    """All parameters random: what is zero at initialisation would hide mistakes."""
    leaves, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0))))
    return tree.unflatten([0.3 * normal(index, *leaf.shape) for index, leaf in enumerate(leaves)])


def pack_of(packs, tokens, clips, config, row=4):
    """With rows for frames of at most so many tokens."""
    places = place_clips(packs, tokens, clips)
    windows = config.attention_windows
    count = len(packs) * (tokens // row + clips)
    rows = PackRows({window.name: ((row, count, 1),) for window in windows}, (row, count))
    return make_pack(*places, windows, rows, config.isolate_images)


# A pack of a video, an image and a video beside a place without a clip; four tokens fill it up. The second clip's label
# is dropped.
GRIDS, TOKENS, CLIPS = [VIDEO, IMAGE, VIDEO], 32, 4
OWN = [slice(0, 12), slice(12, 16), slice(16, 28)]
LABELS = [0, CLASSES, 2]
TIMES = np.array([0.2, 0.5, 0.9], np.float32)
LATENTS, NOISE = normal(0, TOKENS, CHANNELS), normal(1, TOKENS, CHANNELS)
WEIGHTED = DiffusionConfig(Schedule("cosine"), self_conditioning=1.0, base_tokens=4, min_snr=5.0)
TASK = DenoiserTask(model_of(CONFIG, VIDEO, WEIGHTED), ConditioningConfig())


@jax.jit
def results(params, batch, time, noise):
    """(gradients, what moves, metrics) at these times with this noise; all else is without chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "sample_times", lambda config, key, shape: time)
        patch.setattr(jax.random, "normal", lambda key, shape: noise)
        return TASK.gradients(params, {}, None, batch, jax.random.key(0), 0)


@pytest.fixture(scope="module")
def params():
    return filled(TASK.model)


def packed(params, clips, filling=0.0):
    """Results of a pack of some of the clips; what fills it up has these latents."""
    latents, noise = (np.concatenate([x[OWN[clip]] for clip in clips]) for x in (LATENTS, NOISE))
    rest = ((0, TOKENS - len(latents)), (0, 0))
    labels = np.pad([LABELS[clip] for clip in clips], (0, CLIPS - len(clips))).astype(np.int32)
    batch = {
        "tokens": np.pad(latents, rest, constant_values=filling)[None],
        "text": labels[None, :, None],
        "pack": pack_of([[GRIDS[clip] for clip in clips]], TOKENS, CLIPS, CONFIG),
    }
    time = np.pad(TIMES[clips], (0, CLIPS - len(clips)), constant_values=0.7)
    return jax.device_get(results(params, batch, time[None], np.pad(noise, rest, constant_values=1.0)[None]))


def assert_equal(results, expected):
    """Loss and gradients, each to a thousandth of its largest value."""
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path((results[0], results[2]["loss"])),
        jax.tree.leaves((expected[0], expected[2]["loss"])),
        strict=True,
    ):
        scale = float(abs(other).max())
        np.testing.assert_allclose(leaf / scale, other / scale, atol=1e-3, err_msg=jax.tree_util.keystr(path))


def test_a_packs_gradients_are_those_of_its_clips_one_by_one(params):
    """Two videos of 12 tokens and an image of 4: each token's share is the same."""
    alone = [packed(params, [clip]) for clip in range(3)]
    expected = jax.tree.map(lambda *leaves: sum(w * x for w, x in zip((12, 4, 12), leaves, strict=True)) / 28, *alone)
    assert_equal(packed(params, [0, 1, 2]), expected)
    assert_equal(packed(params, [2, 1, 0]), expected)


def test_a_packs_gradients_are_those_of_a_batch_of_equal_clips(params):
    latents, noise = (np.stack([x[OWN[clip]] for clip in (0, 2)]) for x in (LATENTS, NOISE))
    batch = {"latents": latents.reshape(2, *VIDEO, CHANNELS), "text": np.array([[LABELS[0]], [LABELS[2]]], np.int32)}
    expected = jax.device_get(results(params, batch, TIMES[[0, 2], None], noise))
    assert_equal(packed(params, [0, 2]), expected)
    assert expected[1] == {}
    assert set(expected[2]) == {"loss", "loss_by_noise"}


def test_the_loss_is_also_known_by_noise_level(params):
    """Times 0.2, 0.5 and 0.9 are in the first, third and last quarter; padding, at 0.7, is in none."""
    _, _, metrics = packed(params, [0, 1, 2])
    by_noise, width = metrics["loss_by_noise"], CHANNELS
    np.testing.assert_array_equal(by_noise.count, [12 * width, 0, 4 * width, 12 * width])
    np.testing.assert_allclose(by_noise.total.sum() / by_noise.count.sum(), metrics["loss"], rtol=1e-5)
    for quarter, clip in zip((0, 2, 3), range(3), strict=True):
        own = by_noise.total[quarter] / by_noise.count[quarter]
        np.testing.assert_allclose(own, packed(params, [clip])[2]["loss"], rtol=1e-4)


def test_what_fills_a_pack_up_does_not_matter(params):
    plain, other = (packed(params, [0, 1, 2], filling) for filling in (0.0, 1e3))
    jax.tree.map(np.testing.assert_array_equal, plain, other)
    assert np.isfinite(plain[2]["loss"])
    assert plain[2]["tokens_valid_fraction"] == 28 / 32


def test_every_parameter_learns(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed(params, [0, 1, 2])[0]):
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


def test_a_label_is_its_row_and_a_dropped_one_the_last(params):
    grads = np.asarray(packed(params, [0, 1, 2])[0]["denoiser"]["label_embedding"])
    assert grads.shape == (CLASSES + 1, 16)
    assert [bool(row.any()) for row in grads] == [True, False, True, False, True]


class Recorder(LatentDiffusion):
    """Notes what the denoiser is asked, and on what condition; a plain function answers, alike for all labels."""

    calls = []  # noqa: RUF012

    def condition(self, params, ids, **given):
        condition = super().condition(params, ids, **given)
        self.calls.append({"condition": condition})
        return condition

    def denoise(self, params, condition, layout):
        def answer(noisy, time, estimate):
            self.calls[-1] |= {"noisy": noisy, "time": time}
            return params["answer"] + 0 * noisy

        return answer


@pytest.fixture
def record():
    Recorder.calls.clear()

    def run(config, conditioning, batch, diffusion=None, frozen=None, answer=0.0, seed=0, shape=VIDEO):
        """(what was noted, gradients, metrics)"""
        model = model_of(config, shape, diffusion or DiffusionConfig(Schedule("cosine"), "x0"), Recorder)
        task, key = DenoiserTask(model, conditioning), jax.random.key(seed)
        # The clips' answers are a parameter.
        grads, _, metrics = task.gradients({"answer": jnp.asarray(answer)}, {}, frozen, batch, key, 0)
        return jax.device_get((Recorder.calls[-1], grads["answer"], metrics))

    return run


PATCHED = dataclasses.replace(
    CONFIG,
    classes=0,
    patch_size=(1, 2, 2),
    self_conditioning=False,
    frame_prediction=True,
)


def batch_of(clips, shape=(3, 2, 2)):
    return {"latents": normal(5, clips, *shape, CHANNELS), "text": np.zeros((clips, 1), np.int32)}


@pytest.mark.parametrize(("probability", "frames"), [(0.6, (1, 2)), (1.0, (2,)), (0.25, (1,))])
def test_so_many_clips_are_given_their_first_frames(record, probability, frames):
    batch = batch_of(400)
    noted, _, _ = record(PATCHED, ConditioningConfig(frames, probability), batch)
    mask = np.asarray(noted["condition"].observed_mask)
    assert mask.shape == (400, 3, 4)  # a token a frame, of four latent positions
    assert set(np.unique(mask)) <= {0, 1}
    count = mask[..., 0].sum(1).astype(int)
    np.testing.assert_array_equal(mask, np.broadcast_to((np.arange(3) < count[:, None])[..., None], mask.shape))
    shares = np.bincount(count, minlength=4) / 400
    expected = np.zeros(4)
    expected[0] = 1 - probability
    expected[list(frames)] = probability / len(frames)
    np.testing.assert_allclose(shares, expected, atol=0.08)
    # The clean latents there, zeros elsewhere.
    observed = batch["latents"].reshape(400, 3, 4, CHANNELS) * mask[..., None]
    np.testing.assert_array_equal(noted["condition"].observed, observed.reshape(400, 3, 8))


def test_in_packs_each_clip_is_given_frames_for_itself(record):
    grids = [(3, 1, 2), (2, 2, 1), (4, 1, 1)]
    pack = pack_of([grids] * 100, 16, 4, PATCHED)
    batch = {"tokens": normal(0, 100, 16, 8), "text": np.zeros((100, 4, 1), np.int32), "pack": pack}
    noted, grads, _ = record(PATCHED, ConditioningConfig((1, 2), 0.5), batch, answer=np.zeros((100, 16, 8)))
    mask = np.asarray(noted["condition"].observed_mask)
    counts = np.zeros((100, 3), int)
    for row, clip in np.ndindex(100, 3):
        own = pack.positions[row, :, 0] == clip
        frame = pack.positions[row, own, 1]
        counts[row, clip] = len(np.unique(frame[mask[row, own, 0] == 1]))
        np.testing.assert_array_equal(mask[row, own], np.repeat((frame < counts[row, clip])[:, None], 4, axis=1))
    for clip, shares in zip(counts.T, ([0.5, 0.25, 0.25], [0.5, 0.5, 0], [0.5, 0.25, 0.25]), strict=True):
        np.testing.assert_allclose(np.bincount(clip, minlength=3) / 100, shares, atol=0.15)
    assert (abs(np.corrcoef(counts.T) - np.eye(3)) < 0.3).all()
    # What is learned is the rest: neither what is given nor what fills up.
    learned = (pack.positions[..., :1] >= 0) & (mask == 0)
    np.testing.assert_array_equal(grads != 0, np.repeat(learned, CHANNELS, axis=-1))


KINDS = ("start", "end", "every", "one", "random", "rectangles")


def given_frames(mask, grid):
    """Which frames are given whole; None where rectangles are left out of them."""
    frames = mask.reshape(grid[0], -1)
    return None if ((frames > 0).any(1) != (frames > 0).all(1)).any() else frames.all(1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_what_it_says_in_packs_as_in_batches(record, kind):
    grids, conditioning = [(3, 4, 2), (2, 2, 4)], ConditioningConfig((2,), 1.0, (kind,))
    packed = {
        "tokens": normal(0, 60, 42, 8),
        "text": np.zeros((60, 2, 1), np.int32),
        "pack": pack_of([grids] * 60, 42, 2, PATCHED, row=8),
    }
    noted, _, _ = record(PATCHED, conditioning, packed)
    mask = np.asarray(noted["condition"].observed_mask)[..., 0]
    seen = set()
    for row, clip in np.ndindex(60, 2):
        t, own = grids[clip][0], mask[row, packed["pack"].positions[row, :, 0] == clip]
        assert set(np.unique(own)) <= {0, 1}
        if kind == "rectangles":
            # The same in a range of frames, and nothing in those before and after.
            frames = own.reshape(t, -1)
            some = np.flatnonzero(frames.min(1) == 0)
            assert len(some) and (np.diff(some) == 1).all() and (frames[some] == frames[some[0]]).all()
            seen.add((clip, *some, -1, *np.flatnonzero(frames[some[0]] == 0)))
            continue
        frames = given_frames(own, grids[clip])
        assert frames is not None
        if kind == "one":
            assert frames.sum() == 1
        elif kind != "random":
            expected = {"start": range(min(2, t - 1)), "end": range(max(t - 2, 1), t), "every": range(0, t, 4)}[kind]
            np.testing.assert_array_equal(np.flatnonzero(frames), expected)
        seen.add((clip, *np.flatnonzero(frames)))
    if kind in ("start", "end", "every"):
        assert len(seen) == 2
    else:
        assert len(seen) > 4
    if kind == "one":
        assert seen == {(0, t) for t in range(3)} | {(1, t) for t in range(2)}


def test_groups_are_those_that_the_batch_was_drawn_with(record):
    """Where a clip is to observe any; the others are made whole."""
    grids, rng = [(3, 4, 2), (2, 2, 4)], np.random.default_rng(0)
    packed = {
        "tokens": normal(0, 60, 42, 8),
        "text": np.zeros((60, 2, 1), np.int32),
        "pack": pack_of([grids] * 60, 42, 2, PATCHED, row=8),
        "observed": rng.integers(0, 2, (60, 42, 1)).astype(np.float32),
    }
    noted, _, _ = record(PATCHED, ConditioningConfig((1,), 0.7, ("groups",)), packed)
    mask, segments = np.asarray(noted["condition"].observed_mask)[..., 0], packed["pack"].positions[..., 0]
    chosen = 0
    for row, clip in np.ndindex(60, 2):
        own, drawn = mask[row, segments[row] == clip], packed["observed"][row, segments[row] == clip, 0]
        assert (own == drawn).all() or not own.any()
        chosen += own.any()
    assert 0.55 < chosen / 120 < 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_no_clip_is_observed_whole(record, kind):
    """Images and clips shorter than the number of observed frames among them."""
    grids = [(1, 2, 2), (2, 2, 1), (1, 1, 1), (3, 1, 2)]
    pack = pack_of([grids] * 100, 16, 4, PATCHED)
    batch = {"tokens": normal(0, 100, 16, 8), "text": np.zeros((100, 4, 1), np.int32), "pack": pack}
    noted, _, _ = record(PATCHED, ConditioningConfig((1, 2, 5), 1.0, (kind,)), batch)
    mask = np.asarray(noted["condition"].observed_mask)[..., 0]
    for row, clip in np.ndindex(100, 4):
        assert mask[row, pack.positions[row, :, 0] == clip].min() == 0
    if kind == "random":  # 0.8 of frames are generated
        assert mask[pack.positions[..., 0] == 3].mean() == pytest.approx(0.2, abs=0.08)


def test_rectangles_have_at_most_half_of_the_area_and_all_positions_and_aspects():
    height, width = 40, 60
    corner, opposite = (
        np.asarray(x) for x in rectangles(jnp.full((500, 2), jnp.array([height, width])), jax.random.key(0))
    )
    assert (corner >= 0).all() and (opposite <= [height, width]).all() and (corner < opposite).all()
    extent = opposite - corner
    assert (extent.prod(-1).sum(0) < 0.55 * height * width).all()  # sides are rounded
    assert extent.prod(-1).sum(0).mean() > 0.4 * height * width
    large = extent[0][extent[0].prod(-1) > 200]
    aspects = large[:, 0] / large[:, 1]
    assert 0.27 < aspects.min() < 0.4 and 2.5 < aspects.max() < 3.7 and 0.8 < np.median(aspects) < 1.25
    centre = ((corner + opposite) / 2 / [height, width]).mean((0, 1))
    np.testing.assert_allclose(centre, 0.5, atol=0.03)


def test_several_kinds_come_as_often(record):
    conditioning = ConditioningConfig((1,), 0.8, ("start", "end"))
    noted, _, _ = record(PATCHED, conditioning, batch_of(400))
    mask = np.asarray(noted["condition"].observed_mask)[..., 0]
    shares = [(mask == pattern).all(1).mean() for pattern in ([0, 0, 0], [1, 0, 0], [0, 0, 1])]
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.4], atol=0.08)
    noted, _, _ = record(PATCHED, ConditioningConfig((1,), 1.0, ("start", "end", "end", "end")), batch_of(400))
    assert noted["condition"].observed_mask[:, 0, 0].mean() == pytest.approx(0.25, abs=0.08)


def test_the_loss_gets_how_many_tokens_each_clip_has(record, monkeypatch):
    """Which shifts its noise."""
    counts = []
    nothing = jnp.zeros(()), Binned(jnp.zeros(4), jnp.zeros(4))
    monkeypatch.setattr(tasks, "diffusion_loss", lambda *arguments: counts.append(arguments[3]) or nothing)
    config = dataclasses.replace(PATCHED, frame_prediction=False)
    record(config, ConditioningConfig(), batch_of(5))
    np.testing.assert_array_equal(counts[0], np.full((5, 1), 3))
    pack = pack_of([[(3, 1, 2), (2, 2, 1), (4, 1, 1)], [(2, 1, 3)]], 16, 4, config)
    batch = {"tokens": normal(0, 2, 16, 8), "text": np.zeros((2, 4, 1), np.int32), "pack": pack}
    record(config, ConditioningConfig(), batch)
    np.testing.assert_array_equal(counts[1], [[6, 4, 4, 0], [6, 0, 0, 0]])


def test_what_is_given_is_not_learned(record):
    batch = batch_of(400)
    noted, grads, metrics = record(PATCHED, ConditioningConfig((1, 2), 0.7), batch, answer=np.zeros((400, 3, 8)))
    mask = np.repeat(np.asarray(noted["condition"].observed_mask), CHANNELS, axis=-1)
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(grads == 0, mask == 1)
    # x is predicted as zero: the mean square of what is not given.
    wanted = batch["latents"].reshape(400, 3, 8)[mask == 0]
    assert metrics["loss"] == pytest.approx(np.square(wanted).mean(), rel=1e-5)
    assert set(metrics) == {"loss", "loss_by_noise"}


def test_what_is_given_may_be_answered_anyhow(record):
    batch, conditioning = batch_of(400), ConditioningConfig((1,), 1.0)
    wrong = np.zeros((400, 3, 8))
    wrong[:, 0] = 1e3
    losses = [
        record(PATCHED, conditioning, batch, answer=answer)[2]["loss"] for answer in (np.zeros((400, 3, 8)), wrong)
    ]
    assert losses[0] == losses[1]


def test_complex_clips_are_trained_at_more_noise(record):
    config = dataclasses.replace(PATCHED, frame_prediction=False)
    latents = normal(5, 3, 3, 4, 4, CHANNELS)
    latents[1] = latents[1].mean((0, 1, 2), keepdims=True) + 1e-2 * np.arange(4)[None, None, :, None]
    batch = {"latents": latents, "text": np.zeros((3, 1), np.int32)}
    schedule = Schedule("cosine")
    times = [
        record(config, ConditioningConfig(), batch, DiffusionConfig(schedule, adaptive=strength), shape=(3, 4, 4))[0][
            "time"
        ]
        for strength in (0.0, 0.7)
    ]
    expected = adapted_time(schedule, times[0], complexity(jnp.asarray(latents))[:, None], 0.7)
    np.testing.assert_allclose(times[1], expected, rtol=1e-6)
    assert (times[1][::2] > times[0][::2]).all()


@pytest.fixture(scope="module")
def frozen():
    clip = jnp.zeros((1, 3, 8, 8, 3))
    variables = nn.meta.unbox(jax.eval_shape(CODEC.tokenizer.init, jax.random.key(0), clip))
    leaves, tree = jax.tree.flatten(variables)
    variables = tree.unflatten([0.3 * normal(index, *leaf.shape) for index, leaf in enumerate(leaves)])
    return TrainedTokenizer(variables, jnp.array([0.1, -0.2]), jnp.array([0.5, 2.0]))


VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
UPSCALING = dataclasses.replace(CONFIG, classes=0, upscale=2, positions="learned", self_conditioning=False)
SMALL = normal(7, 2, 3, 2, 2, CHANNELS)
PIXELS = {"video": VIDEOS, "text": np.zeros((2, 1), np.int32)}
PAIRS = {**PIXELS, "low_res": SMALL}
LARGE = (3, 4, 4)  # of latents


def test_clips_are_encoded_where_there_are_no_latents(record, frozen):
    """A model that says just those latents has no loss."""
    config = dataclasses.replace(UPSCALING, upscale=1)
    latents, _ = CODEC.encode(frozen, VIDEOS)
    answer = np.asarray(latents).reshape(2, 48, CHANNELS)
    _, _, metrics = record(config, ConditioningConfig(), PIXELS, frozen=frozen, answer=answer, shape=LARGE)
    assert metrics["loss"] == pytest.approx(0, abs=1e-8)
    _, _, other = record(config, ConditioningConfig(), PIXELS, frozen=frozen, answer=0 * answer, shape=LARGE)
    assert other["loss"] == pytest.approx(np.square(answer).mean(), rel=1e-5)


def test_low_resolution_is_what_the_batch_has(record, frozen):
    noted, _, _ = record(UPSCALING, ConditioningConfig(), PAIRS, frozen=frozen, shape=LARGE)
    condition = noted["condition"]
    np.testing.assert_allclose(condition.low_res, SMALL, atol=1e-5)
    np.testing.assert_array_equal(condition.low_res_time, np.zeros((2, 1)))


def test_low_resolution_has_the_noise_that_the_model_is_conditioned_on(record, frozen):
    clean = SMALL.astype(np.float64)
    conditioning, times, noises = ConditioningConfig(low_res_noise=0.4), [], []
    for seed in range(40):
        noted, _, _ = record(UPSCALING, conditioning, PAIRS, frozen=frozen, seed=seed, shape=LARGE)
        time = np.asarray(noted["condition"].low_res_time, np.float64)
        assert time.shape == (2, 1)
        angle = 0.5 * np.pi * time[..., None, None, None]
        noises.append((np.asarray(noted["condition"].low_res) - np.cos(angle) * clean) / np.sin(angle))
        times.append(time[:, 0])
    times, noises = np.array(times), np.array(noises)
    assert 0 <= times.min() < 0.05
    assert 0.35 < times.max() < 0.4
    assert abs(np.corrcoef(times.T)[0, 1]) < 0.4  # a time a clip
    late = noises[times > 0.1]  # where dividing by σ is exact
    assert abs(late.mean()) < 0.05
    assert late.std() == pytest.approx(1, abs=0.05)


def test_upscaling_trains(frozen):
    diffusion = DiffusionConfig(Schedule("linear"))
    model = LatentDiffusion(CODEC, None, Denoiser(UPSCALING, LARGE), diffusion, (*LARGE, CHANNELS))
    task, params = DenoiserTask(model, ConditioningConfig(low_res_noise=0.3)), filled(model)
    grads, _, metrics = jax.device_get(jax.jit(task.gradients)(params, {}, frozen, PAIRS, jax.random.key(0), 0))
    assert np.isfinite(metrics["loss"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


def test_what_is_trained_is_what_is_served():
    task = DenoiserTask(model_of(CONFIG, VIDEO, WEIGHTED), ConditioningConfig())
    assert task.served({"a": 1}, {}) == {"a": 1}
    params, served = {"a": np.zeros(2), "text": np.ones(1)}, {"a": np.arange(2.0)}
    started, moving = task.start(params, {}, served)
    np.testing.assert_array_equal(started["a"], served["a"])
    assert started["text"] is params["text"] and moving == {}
    params, moving = jax.eval_shape(task.init, jax.random.key(0))
    assert set(params) == {"denoiser"}
    assert moving == {}
