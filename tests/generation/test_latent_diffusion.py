"""Sampling: what is observed keeps the noise of training, guidance leaves it out, low resolution reaches the model."""

import dataclasses
import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.denoiser.model import Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.diffusion.guidance import APGConfig, GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig
from walt_jax.diffusion.sampler import sample
from walt_jax.diffusion.schedule import Schedule
from walt_jax.errors import UserError
from walt_jax.generation import latent_diffusion
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion, SamplingConfig

SHAPE = (3, 2, 2, 2)
CONFIG = WaltConfig(
    dim=16, heads=2, layers=1, windows=((1, None, None),), positions="fractional", relative="rotary",
    cross_attention=False, classes=4, frame_prediction=True, self_conditioning=False,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Recorder(LatentDiffusion):
    """Notes {what a condition has, "noisy", "time"} of each evaluation and answers with a plain wrong prediction."""

    calls: ClassVar[list] = []

    def answer(self, condition, noisy):
        return 0.3 * noisy + 1

    def denoise(self, params, condition, layout):
        noted = {name: value for name, value in vars(condition).items() if value is not None}

        def answer(noisy, time, estimate):
            values = {**noted, "noisy": noisy, "time": time}
            jax.debug.callback(lambda values: self.calls.append(jax.tree.map(np.asarray, values)), values)
            return self.answer(condition, noisy)

        return answer


class Labeller(Recorder):
    """Says that all values are the label, in which a dropped one is 4."""

    def answer(self, condition, noisy):
        return jnp.broadcast_to(condition.label[..., None].astype(jnp.float32), noisy.shape)


LABELS, EMPTY, SEEDS = jnp.array([[1], [2]]), jnp.array([[4], [4]]), np.arange(2, dtype=np.uint32)


def draw(kind, sampling, config=CONFIG, base_tokens=0, seeds=SEEDS, **conditions):
    """(what was noted of each evaluation, latents) of two clips."""
    Recorder.calls.clear()
    diffusion = DiffusionConfig(Schedule("cosine"), "x0", base_tokens=base_tokens)
    model = kind(None, None, Denoiser(config, SHAPE[:3]), diffusion, SHAPE)
    out = model.sample({}, LABELS, EMPTY, seeds, sampling, **conditions)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return Recorder.calls[:], np.asarray(out)


def observed_frames():
    """(latents, until) of which the clips' first one or two frames are observed."""
    observed = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    until = np.full((2, *SHAPE[:3], 1), NEVER, np.float32)
    until[0, :1] = until[1, :2] = 0
    return observed, until


@pytest.fixture(params=[0, 128], ids=["one after the other", "in one batch"])
def at_once(request, monkeypatch):
    """Whether conditional and unconditional are evaluated in one batch."""
    monkeypatch.setattr(latent_diffusion, "AT_ONCE", request.param)
    jax.clear_caches()  # programs know nothing of the constant
    yield request.param > 0
    jax.clear_caches()


def split(calls):
    """The rows of each call with the clips' labels, and those with the empty one."""
    rows = [[(call, (call["label"] == 4).all(-1) == dropped) for call in calls] for dropped in (False, True)]
    return [[{name: a[own] for name, a in call.items()} for call, own in some if own.any()] for some in rows]


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "unipc"])
def test_observed_positions_follow_the_forward_process(sampler):
    """Their noise at each time is the first noise scaled, as in training, however wrong the denoiser is."""
    observed, until = observed_frames()
    calls, out = draw(Recorder, SamplingConfig(6, sampler), observed=observed, until=until)
    calls.sort(key=lambda call: -call["time"].max())
    where = np.broadcast_to(until.reshape(2, 12, 1), (2, 12, 2)) == 0
    clean, schedule, noises = observed.reshape(2, 12, 2), Schedule("cosine"), []
    for call in calls:
        alpha, sigma = (np.asarray(level)[..., None] for level in schedule(jnp.asarray(call["time"])))
        noises.append(((call["noisy"] - alpha * clean) / sigma)[where])
    assert len({float(call["time"].max()) for call in calls}) >= 5
    for noise in noises[1:]:
        np.testing.assert_allclose(noise, noises[0], atol=2e-2)
    np.testing.assert_array_equal(out.reshape(2, 12, 2)[where], clean[where])


def test_what_is_not_observed_is_sampled():
    observed, until = observed_frames()
    _, out = draw(Labeller, SamplingConfig(4), observed=observed, until=until)
    expected = np.where(until == 0, observed, np.asarray(LABELS).reshape(2, 1, 1, 1, 1))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_without_observed_frames_the_mask_is_empty():
    calls, _ = draw(Recorder, SamplingConfig(2))
    assert calls
    for call in calls:
        assert not call["observed_mask"].any() and not call["observed"].any()


def test_guidance_leaves_observed_positions_out(at_once):
    observed, until = observed_frames()
    calls, _ = draw(Recorder, SamplingConfig(6, "ddim", GuidanceConfig(scale=2.0)), observed=observed, until=until)
    conditional, unconditional = split(calls)
    assert len(conditional) == len(unconditional) == len(calls) / (1 if at_once else 2) == 6
    for call in conditional:
        np.testing.assert_array_equal(call["observed_mask"], until.reshape(2, 12, 1) == 0)
        np.testing.assert_allclose(call["observed"], (observed * (until == 0)).reshape(2, 12, 2))
    for call in unconditional:
        assert not call["observed_mask"].any() and not call["observed"].any()


def real_model(config):
    """A denoiser with random parameters, and these; nothing of it is zero."""
    model = LatentDiffusion(None, None, Denoiser(config, SHAPE[:3]), DiffusionConfig(Schedule("cosine"), "v"), SHAPE)
    leaves, tree = jax.tree.flatten(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0))))
    rng = np.random.default_rng(2)
    return model, tree.unflatten([0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def real(sampling, config, rows=(0, 1), **conditions):
    """Latents of clips from `real_model`."""
    model, params = real_model(config)
    rows = np.array(rows)
    return np.asarray(model.sample(params, LABELS[rows], EMPTY[rows], SEEDS[rows], sampling, **conditions))


@pytest.mark.parametrize("apg", [None, APGConfig(0.2, 3.0, -0.5)])
def test_one_batch_for_both_gives_the_same(monkeypatch, apg):
    """Self-conditioning, observed frames and guidance included."""
    config, found = dataclasses.replace(CONFIG, self_conditioning=True), []
    observed, until = observed_frames()
    for most in (0, 128):
        monkeypatch.setattr(latent_diffusion, "AT_ONCE", most)
        jax.clear_caches()
        sampling = SamplingConfig(3, "ddim", GuidanceConfig(2.0, apg=apg))
        found.append(real(sampling, config, observed=observed, until=until))
    jax.clear_caches()
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert np.abs(found[0] - real(SamplingConfig(3), config, observed=observed, until=until)).max() > 0.1


def test_apg_carries_its_momentum():
    """The estimates are always the labels, so Δ = x_c − x_u is one number: the last step has all of the momentum."""
    apg = APGConfig(parallel=1.0, momentum=-0.5)
    _, out = draw(Labeller, SamplingConfig(3, "ddim", GuidanceConfig(2.0, apg=apg)))
    label = np.asarray(LABELS).reshape(2, 1, 1, 1, 1) + np.zeros((2, *SHAPE))
    momentum = 1 - 0.5 * (1 - 0.5)
    np.testing.assert_allclose(out, label + (label - 4) * momentum, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 1])
def test_so_many_channels_are_guided(channels):
    """x = x_u + w (x_c − x_u); the other channels are the conditional model's."""
    guidance = GuidanceConfig(scale=3.0, channels=channels)
    _, out = draw(Labeller, SamplingConfig(4, "ddim", guidance))
    label = np.asarray(LABELS).reshape(2, 1, 1, 1, 1) + np.zeros((2, *SHAPE))
    guided = 4 + 3.0 * (label - 4)
    expected = np.where(np.arange(2) < (channels or 2), guided, label)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_low_resolution_reaches_both_models_without_noise(at_once):
    config = dataclasses.replace(CONFIG, frame_prediction=False, upscale=2)
    low_res = np.random.default_rng(1).normal(size=(2, 3, 1, 1, 2)).astype(np.float32)
    calls, _ = draw(Recorder, SamplingConfig(3, "ddim", GuidanceConfig(scale=2.0)), config, low_res=low_res)
    assert [len(some) for some in split(calls)] == [3] * 2
    for call in itertools.chain(*split(calls)):
        np.testing.assert_array_equal(call["low_res"], low_res)
        np.testing.assert_array_equal(call["low_res_time"], np.zeros((2, 1)))


def test_more_tokens_than_the_base_are_sampled_at_more_noise():
    """Of 12 tokens over 3, σ/α is twice the schedule's: with clean latents of one value the noise left is the first."""
    calls, _ = draw(Labeller, SamplingConfig(5), base_tokens=3)
    calls.sort(key=lambda call: -call["time"].max())
    assert len(calls) == 5
    for call in calls[1:]:
        angle = np.arctan(2 * np.tan(np.pi / 2 * call["time"].astype(np.float64)))[..., None]
        noise = (call["noisy"] - np.cos(angle) * np.asarray(LABELS)[..., None]) / np.sin(angle)
        np.testing.assert_allclose(noise, calls[0]["noisy"], atol=1e-3)


def test_a_clips_randomness_depends_on_its_own_seed():
    """Also that of samplers which add noise."""
    _, both = draw(Recorder, SamplingConfig(3, "ddpm"))
    _, other = draw(Recorder, SamplingConfig(3, "ddpm"), seeds=np.array([0, 7], np.uint32))
    np.testing.assert_array_equal(both[0], other[0])
    assert np.abs(both[1] - other[1]).min() > 0


class Mean(Recorder):
    """The mean velocity of a flow whose clean latents are the labels: u = (z − x) / t, whatever the step."""

    def denoise(self, params, condition, layout):
        def answer(noisy, time, estimate, step):
            jax.debug.callback(lambda values: self.calls.append(jax.tree.map(np.asarray, values)), (time, step))
            x = jnp.broadcast_to(condition.label[..., None].astype(jnp.float32), noisy.shape)
            return (noisy - x) / time[..., None]

        return answer


@pytest.mark.parametrize("steps", [1, 4])
def test_a_mean_velocity_is_asked_for_the_samplers_steps(steps):
    """From t to the next time, with guidance as an input: one evaluation a step, and exact in any number of them."""
    config = dataclasses.replace(CONFIG, mean_velocity=True)
    guidance = GuidanceConfig(3.0, "interval", (0.2, 0.8))
    Recorder.calls.clear()
    model = Mean(None, None, Denoiser(config, SHAPE[:3]), DiffusionConfig(Schedule("flow"), "flow"), SHAPE)
    out = model.sample({}, LABELS, EMPTY, SEEDS, SamplingConfig(steps, "euler", guidance))
    jax.block_until_ready(out)
    jax.effects_barrier()
    np.testing.assert_allclose(out, np.asarray(LABELS).reshape(2, 1, 1, 1, 1) + np.zeros((2, *SHAPE)), atol=1e-5)
    calls = sorted(Recorder.calls, key=lambda call: -call[0].max())
    assert len(calls) == steps
    for number, (time, step) in enumerate(calls):
        np.testing.assert_allclose(time, 1 - number / steps)
        np.testing.assert_allclose(step.end, 1 - (number + 1) / steps, atol=1e-6)
        np.testing.assert_array_equal(step.scale, 3.0)
        np.testing.assert_allclose(step.interval, np.broadcast_to([0.2, 0.8], (2, 1, 2)))
    with pytest.raises(UserError, match="at least 1"):
        model.sample({}, LABELS, EMPTY, SEEDS, SamplingConfig(steps, "euler", GuidanceConfig(0.0)))


def test_a_caches_threshold_that_nothing_passes_changes_nothing():
    """Through all evaluations, with guidance, one after the other and in one batch."""
    sampling = SamplingConfig(4, "ddim", GuidanceConfig(2.0))
    config = dataclasses.replace(CONFIG, layers=2)
    plain = real(sampling, config)
    cached = real(dataclasses.replace(sampling, first_block_cache=1e-9), config)
    np.testing.assert_allclose(cached, plain, atol=1e-3)
    coarse = real(dataclasses.replace(sampling, first_block_cache=1e9), config)
    assert np.abs(coarse - plain).max() > 1e-2


def test_a_cached_clip_does_not_depend_on_the_others():
    sampling = SamplingConfig(4, first_block_cache=0.5)
    config = dataclasses.replace(CONFIG, layers=2)
    together = real(sampling, config)
    alone = [real(sampling, config, rows=[row]) for row in range(2)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc", "heun"])
def test_one_program_serves_any_number_of_steps_and_any_guidance(sampler):
    """Each equals the program of its own numbers alone: all evaluations in one scan, the numbers as constants."""
    config = dataclasses.replace(CONFIG, self_conditioning=True)
    model, params = real_model(config)
    compiled = []
    for steps, scale, interval in ((2, 1.5, (0.1, 0.8)), (5, 3.0, (0.3, 0.9)), (4, 2.2, (0.0, 1.0))):
        sampling = SamplingConfig(steps, sampler, GuidanceConfig(scale, "interval", interval), batch_size=steps)
        found = model.sample(params, LABELS, EMPTY, SEEDS, sampling)
        compiled.append(model._step._cache_size())

        @jax.jit
        def alone(params, labels, sampling=sampling):
            asked = model.asked(labels, EMPTY, SEEDS, SHAPE)
            predict, levels, carried = model.predictor(params, asked, sampling)
            noise = model.tokens(model.noise(SEEDS, SHAPE))
            return sample(sampling.sampler, predict, noise, levels, sampling.steps, asked.keys, carried)

        np.testing.assert_allclose(found.reshape(2, 12, 2), alone(params, LABELS), atol=3e-6, rtol=3e-6)
    assert compiled[0] == compiled[1] == compiled[2]
