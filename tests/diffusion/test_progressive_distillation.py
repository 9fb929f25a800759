"""Progressive distillation: the target is two DDIM steps of the teacher in one, as a sampler takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion.guidance import GuidanceConfig
from walt_jax.diffusion.objective import DiffusionConfig, Draws
from walt_jax.diffusion.parameterization import clean, target
from walt_jax.diffusion.progressive import Latents, distillation_loss
from walt_jax.diffusion.sampler import sample
from walt_jax.diffusion.schedule import Schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLEAN, NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
SCHEDULES = {"v": Schedule("linear", zero_terminal_snr=False), "flow": Schedule("flow"), "x0": Schedule("cosine")}


def spread(values):
    return jnp.broadcast_to(values, (3, 4, values.shape[-1]))


def model(kind, schedule, slope, calls=None, carried=0.2):
    """A denoiser whose estimate of the clean latents is slope · sin z + carried · estimate + t."""

    def denoise(z, time, estimate):
        if calls is not None:
            calls.append((np.asarray(time), np.asarray(z), np.asarray(estimate)))
        alpha, sigma = (spread(level[..., None]) for level in schedule(time))
        x = slope * jnp.sin(z) + carried * estimate + spread(time[..., None])
        return target(kind, x, (z - alpha * x) / sigma, alpha, sigma)

    return denoise


def loss(kind, steps, times, student, teacher, guidance=None, conditioned=None, held=None):
    chosen = None if conditioned is None else jnp.asarray(conditioned)[:, None]
    config = DiffusionConfig(SCHEDULES[kind], kind, self_conditioning=0.0 if conditioned is None else 0.9)
    counted = np.ones_like(CLEAN) if held is None else 1 - held
    latents = Latents(CLEAN, counted, held, jnp.full((3, 1), 4.0), spread)
    draws = Draws(jnp.asarray(times, jnp.float32)[:, None], NOISE, chosen)
    return distillation_loss(student, teacher, latents, draws, steps, guidance or GuidanceConfig(), config)


@pytest.mark.parametrize("kind", ["v", "flow", "x0"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_without_error_samples_as_its_teacher_in_twice_the_steps(kind, steps):
    """Trajectories of the sampler itself: the loss is 0 for a student whose step is where the teacher's two lead."""
    schedule = SCHEDULES[kind]
    teacher = model(kind, schedule, 0.5, carried=0.0)

    def two_steps(z, time, _):
        """The exact student, by the solver's own steps, one clip at a time."""
        half, after = time - 0.5 / steps, jnp.maximum(time - 1 / steps, 0)
        state = z
        for here, there in ((time, half), (half, after)):
            (a, s), (b, r) = ([spread(level[..., None]) for level in schedule(t)] for t in (here, there))
            x = clean(kind, teacher(state, here, jnp.zeros_like(z)), state, a, s)
            state = b * x + r * (state - a * x) / s
        (a, s), (b, r) = ([spread(level[..., None]) for level in schedule(t)] for t in (time, after))
        x = (s * state - r * z) / (s * b - r * a)  # of b x + r (z − a x) / s = state
        return target(kind, x, (z - a * x) / s, a, s)

    times = np.array([0.01, 0.55, 0.98])
    value, by_level = loss(kind, steps, times, two_steps, [teacher])
    assert value < 1e-9
    assert loss(kind, steps, times, teacher, [teacher])[0] > 1e-3
    assert float(by_level.count.sum()) == CLEAN.size

    def predict(denoise):
        def one(z, time, carried):
            levels = (spread(level[..., None]) for level in schedule(jnp.full((3, 1), time)))
            return clean(kind, denoise(z, jnp.full((3, 1), time), jnp.zeros_like(z)), z, *levels), carried

        return one

    key = jax.random.key(0)
    short = sample("ddim", predict(two_steps), NOISE, schedule, steps, key)
    long = sample("ddim", predict(teacher), NOISE, schedule, 2 * steps, key)
    np.testing.assert_allclose(short, long, atol=2e-4)


def test_evaluations_are_made_where_a_sampler_makes_them():
    """Times on the student's grid, the teacher's second one half a step later; estimates of the step before."""
    calls = {"student": [], "teacher": []}
    kind, schedule = "v", SCHEDULES["v"]
    models = {name: model(kind, schedule, 0.5, seen) for name, seen in calls.items()}
    loss(kind, 4, [0.01, 0.55, 0.98], models["student"], [models["teacher"]], conditioned=[True, False, True])
    times = np.array([0.25, 0.75, 1.0])
    for name, stride in (("student", 0.25), ("teacher", 0.125)):
        earlier, first = calls[name][:2]
        np.testing.assert_allclose(earlier[0][:, 0], np.minimum(times + stride, 1))
        np.testing.assert_array_equal(earlier[2], 0)
        np.testing.assert_allclose(first[0][:, 0], times)
        # Carried only where the clip is self-conditioned, and not into the first step of a sampler.
        assert [bool(np.any(estimate)) for estimate in first[2]] == [True, False, False]
    second = calls["teacher"][2]
    np.testing.assert_allclose(second[0][:, 0], times - 0.125)
    assert len(calls["student"]) == 2 and len(calls["teacher"]) == 3
    assert all(np.any(estimate) for estimate in second[2])


def test_the_teachers_guidance_is_learned():
    """With scale 2 the student's estimate is x_u + 2 (x_c − x_u): of constant estimates 2 · 3 − 1."""
    kind, schedule = "flow", SCHEDULES["flow"]

    def constant(value):
        def denoise(z, time, estimate):
            alpha, sigma = (spread(level[..., None]) for level in schedule(time))
            return target(kind, jnp.full_like(z, value), (z - alpha * value) / sigma, alpha, sigma)

        return denoise

    guidance, teacher = GuidanceConfig(2.0), [constant(3.0), constant(1.0)]
    assert loss(kind, 2, [0.3, 0.6, 0.9], constant(5.0), teacher, guidance)[0] < 1e-8
    assert loss(kind, 2, [0.3, 0.6, 0.9], constant(3.0), teacher, guidance)[0] > 0.1


def test_observed_values_are_held_and_have_no_loss():
    """What is observed stays on its own noise's path, whatever the teacher says of it."""
    kind, schedule, held = "v", SCHEDULES["v"], np.zeros_like(CLEAN)
    held[:, :2] = 1
    calls = []
    loss(kind, 2, [0.4, 0.4, 0.9], model(kind, schedule, 0.5), [model(kind, schedule, 0.5, calls)], held=held)
    for time, z, _ in calls:
        alpha, sigma = (np.asarray(spread(level[..., None])) for level in schedule(jnp.asarray(time)))
        np.testing.assert_allclose(z[:, :2], (alpha * CLEAN + sigma * NOISE)[:, :2], atol=1e-5)

    def wrong_there(z, time, estimate):
        return model(kind, schedule, 0.5)(z, time, estimate) + 100 * held

    assert loss(kind, 2, [0.4, 0.4, 0.9], wrong_there, [model(kind, schedule, 0.5)], held=held)[0] < 1


def test_no_gradient_reaches_the_target():
    kind, schedule = "v", SCHEDULES["v"]

    def of(slopes):
        student, teacher = (model(kind, schedule, slope) for slope in slopes)
        return loss(kind, 2, [0.3, 0.6, 0.9], student, [teacher], conditioned=[True, True, True])[0]

    student, teacher = jax.grad(of)((0.3, 0.5))
    assert student != 0 and teacher == 0
