"""α-Flow: the exact mean velocity of a Gaussian has no loss, guidance is learned, and what is drawn is as it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.config import build
from walt_jax.diffusion.alpha_flow import AlphaFlowConfig, StepDraws, alpha_at, alpha_flow_loss, draw_steps
from walt_jax.diffusion.objective import DiffusionConfig, Draws
from walt_jax.diffusion.progressive import Latents
from walt_jax.diffusion.schedule import Schedule
from walt_jax.diffusion.times import TimesConfig
from walt_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLIPS = 4
CLEAN, NOISE = np.random.default_rng(0).normal(size=(2, CLIPS, 3, 2)).astype(np.float32)
TIME, END = np.array([0.9, 1.0, 0.6, 0.5], np.float32), np.array([0.2, 0.0, 0.5, 0.5], np.float32)
SCALE = np.array([1.0, 2.0, 4.0, 3.0], np.float32)
INTERVAL = np.array([[0.0, 1.0], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9]], np.float32)
MEAN, DEVIATION = 0.7, 0.4
FLOW = DiffusionConfig(Schedule("flow"), "flow")


def spread(values):
    return jnp.broadcast_to(values, (CLIPS, 3, values.shape[-1]))


def moved(z, time, end):
    """Where the flow of Gaussian data takes z from a time to another: its mean and deviation there, in closed form."""
    t, r = (spread(values[..., None]) for values in (time, end))
    deviations = [jnp.sqrt((1 - at) ** 2 * DEVIATION**2 + at**2) for at in (t, r)]
    return (1 - r) * MEAN + deviations[1] / deviations[0] * (z - (1 - t) * MEAN)


def exact(z, time, end, scale, interval):
    """The mean velocity of that flow; at an instant its derivative."""
    t, length = spread(time[..., None]), spread((time - end)[..., None])
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    x = MEAN + (1 - t) * DEVIATION**2 / variance * (z - (1 - t) * MEAN)
    velocity = (z - x) / t
    return jnp.where(length > 0, (z - moved(z, time, end)) / jnp.maximum(length, 1e-6), velocity)


def loss(conditional, alpha, unconditional=exact, diffusion=FLOW, held=None, end=END, **knobs):
    config = AlphaFlowConfig(**{"scale": 1.0, **knobs})
    counted = np.ones_like(CLEAN) if held is None else 1 - held
    latents = Latents(CLEAN, counted, held, jnp.full((CLIPS, 1), 3.0), spread)
    time, end, scale = (jnp.asarray(values)[:, None] for values in (TIME, end, SCALE))
    steps = StepDraws(end, scale, jnp.asarray(INTERVAL)[:, None])
    return alpha_flow_loss(
        conditional, unconditional, latents, Draws(time, NOISE, None), steps, jnp.float32(alpha), config, diffusion
    )


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.8])
def test_the_exact_mean_velocity_has_no_loss(alpha):
    """With the model's own velocity over the first part, at any α, over steps of some length."""
    end = np.minimum(END, TIME - 0.1)
    assert loss(exact, alpha, end=end)[0] < 1e-8
    instantaneous = lambda z, time, end, *rest: exact(z, time, time, *rest)  # noqa: E731
    assert loss(instantaneous, alpha, end=end)[0] > 1e-4
    # With the data's noisy velocity there is a variance that stays.
    assert loss(exact, alpha, end=end, velocity="data")[0] > 1e-2


def linear(z, time, end, scale, interval):
    return 0.3 * z + spread((time - 2 * end)[..., None])


@pytest.mark.parametrize("velocity", ["data", "model"])
def test_by_hand(velocity):
    """The formula for one clip after the other, in NumPy."""
    total, alpha = 0.0, 0.25
    for clip in range(CLIPS):
        t, r = float(TIME[clip]), float(END[clip])
        x, noise = CLEAN[clip].astype(float), NOISE[clip].astype(float)
        u = lambda z, end, time: 0.3 * z + time - 2 * end  # noqa: E731
        z, s = (1 - t) * x + t * noise, alpha * r + (1 - alpha) * t
        first = noise - x if velocity == "data" or r == t else u(z, s, t)
        wanted = alpha * first + (1 - alpha) * u(z - (t - s) * first, r, s) if r < t else first
        total += ((u(z, r, t) - wanted) ** 2).sum() / (alpha if r < t else 1)
    value, by_level = loss(linear, alpha, velocity=velocity)
    np.testing.assert_allclose(value, total / CLEAN.size, rtol=1e-4)
    assert by_level.count.sum() == CLEAN.size


def test_alpha_1_is_flow_matching():
    """Along straight paths: the prediction against ε − x, whatever the step."""
    t, noisy = TIME[:, None, None], (1 - TIME[:, None, None]) * CLEAN + TIME[:, None, None] * NOISE
    expected = np.square(0.3 * noisy + t - 2 * END[:, None, None] - (NOISE - CLEAN)).mean()
    np.testing.assert_allclose(loss(linear, 1.0, velocity="data")[0], expected, rtol=1e-5)


def test_guidance_is_learned():
    """At instants the minimum is u_u + w (v − u_u) inside of the interval, and v outside."""
    v = jnp.asarray(NOISE - CLEAN)  # of one clip of data, all that is known

    def unconditional(z, time, end, scale, interval):
        assert (np.asarray(scale) == 1).all()
        return jnp.full_like(z, 0.5)

    def guided(z, time, end, scale, interval):
        inside = (interval[..., 0] <= time) & (time <= interval[..., 1])
        w = spread(jnp.where(inside, scale, 1.0)[..., None])
        return 0.5 + w * (v - 0.5)

    assert loss(guided, 0.5, unconditional, end=TIME, scale=8.0)[0] < 1e-8
    for clip, inside in enumerate([True, False, True, True]):  # time 1 is not in 0.3..0.7
        assert inside == bool(INTERVAL[clip, 0] <= TIME[clip] <= INTERVAL[clip, 1])
    plain = lambda z, *rest: v  # noqa: E731
    assert loss(plain, 0.5, unconditional, end=TIME, scale=8.0)[0] > 0.1
    assert loss(plain, 0.5, unconditional, end=TIME)[0] < 1e-8  # a largest scale of 1: nothing is guided


def test_a_shifted_schedule_is_stepped_in_sigma():
    """z_r = z_t − (σ_t − σ_r) u: the exact mean velocity over σ has no loss in a shifted schedule either."""
    shifted = DiffusionConfig(Schedule("flow", shift=3.0), "flow")

    def over_sigma(z, time, end, *rest):
        return exact(z, *(shifted.schedule(at)[1] for at in (time, end)), *rest)

    assert loss(over_sigma, 0.5, diffusion=shifted, end=np.minimum(END, TIME - 0.1))[0] < 1e-8


def test_gradients_flow_through_one_evaluation():
    """The gradient is that of the prediction against a target that is a constant."""

    def scaled(slope):
        return lambda z, time, end, *rest: slope * linear(z, time, end, *rest)

    def whole(slope):
        return loss(scaled(slope), 0.25, scaled(slope), scale=8.0)[0]

    calls = []

    def only_the_last(slope):
        calls.clear()

        def conditional(z, time, end, *rest):
            calls.append(1)
            last = len(calls) == 4  # guided at t, over the first part, over the rest, the prediction
            return scaled(slope if last else 1.0)(z, time, end, *rest)

        return loss(conditional, 0.25, scaled(1.0), scale=8.0)[0]

    np.testing.assert_allclose(jax.grad(whole)(1.0), jax.grad(only_the_last)(1.0), rtol=1e-5)
    assert len(calls) == 4 and abs(jax.grad(whole)(1.0)) > 1e-3


def test_what_is_observed_is_held():
    held, calls = np.zeros_like(CLEAN), []
    held[:, :1] = 1

    def noted(z, time, end, *rest):
        calls.append((z, time))
        return linear(z, time, end, *rest)

    loss(noted, 0.25, held=held)
    assert len(calls) == 3
    for z, time in calls:
        expected = ((1 - time[..., None]) * CLEAN + time[..., None] * NOISE)[:, :1]
        np.testing.assert_allclose(z[:, :1], expected, atol=1e-5)


def test_draws():
    """t and r in order, independent but for that, alike for a share of the clips; w and interval in their ranges."""
    config, times = AlphaFlowConfig(instants=0.25, scale=8.0), TimesConfig()
    time = np.random.default_rng(0).permutation(np.linspace(0.001, 0.999, 4000)).reshape(-1, 1).astype(np.float32)
    start, steps = draw_steps(jax.random.key(0), jnp.asarray(time), times, config)
    assert (steps.end <= start).all() and (start >= time - 1e-6).mean() > 0.75
    assert abs(float((steps.end == start).mean()) - 0.25) < 0.03
    lengths = (start - steps.end)[steps.end < start]
    np.testing.assert_allclose(lengths.mean(), 1 / 3, atol=0.02)  # of two independent uniform numbers
    assert 1 <= steps.scale.min() < 1.1 and 7.5 < steps.scale.max() <= 8
    np.testing.assert_allclose(jnp.log(steps.scale).mean(), np.log(8) / 2, atol=0.05)
    low, high = steps.interval[..., 0], steps.interval[..., 1]
    assert 0 <= low.min() < low.max() <= 0.5 <= high.min() < high.max() <= 1
    sorted_times = jnp.sort(jnp.asarray(time), axis=0)  # as they come: stratified along the batch
    start, steps = draw_steps(jax.random.key(0), sorted_times, times, dataclasses.replace(config, instants=0.0))
    np.testing.assert_allclose((start - steps.end).mean(), 1 / 3, atol=0.02)


def test_alpha_falls_from_1():
    parts = jnp.linspace(0, 1, 101)
    falling = alpha_at(AlphaFlowConfig(alpha=0.05, anneal=0.5), parts)
    assert falling[0] > 0.999 and (jnp.diff(falling) <= 0).all()
    np.testing.assert_allclose(falling[25], 0.5, atol=1e-3)
    np.testing.assert_allclose(falling[50:], 0.05)
    np.testing.assert_array_equal(alpha_at(AlphaFlowConfig(alpha=0.5), parts), 0.5)
    with pytest.raises(UserError, match="alpha is 0"):
        build(AlphaFlowConfig, {"alpha": 0.0}, "alpha_flow")
