"""Samplers against data whose exact denoiser is known, and against loops that spell out their papers.

Here a clip is a schedule: levels may differ from clip to clip, so one call samples along all of them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion.sampler import SAMPLERS, sample
from walt_jax.diffusion.schedule import Schedule

SCHEDULES = [
    Schedule("linear"),
    Schedule("cosine"),
    Schedule("flow"),
    Schedule("flow", shift=3.0),
    Schedule("cosine", shift=0.5),
]
NAMES = [f"{s.name}-{s.shift:g}" for s in SCHEDULES]
# Of Gaussian data, each channel's: errors of several widths don't all change sign at one number of steps.
MEAN, DEVIATION = np.array([[[1.5, -0.5, 0.2]]]), np.array([[[0.25, 0.5, 1.2]]])
SHAPE = (len(SCHEDULES), 4, 3)
NOISE = np.random.default_rng(0).normal(size=SHAPE)
KEY = jax.random.key(0)

# "euler" is "ddim", which `test_equals_the_loop` shows with a twin of each.
every = pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "euler"])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def levels(time, low=0.0, high=1.0):
    """α and σ [clips, 1, 1], each clip's of its own schedule, between two of its times."""
    pairs = [schedule(low + (high - low) * time) for schedule in SCHEDULES]
    return tuple(jnp.stack(each)[:, None, None] for each in zip(*pairs, strict=True))


inner = functools.partial(levels, low=0.1, high=0.9)  # where λ is finite


def exact(levels):
    """E[x | z] for x ~ N(MEAN, DEVIATION²)."""

    def predict(z, time, carried):
        alpha, sigma = levels(time)
        variance = alpha**2 * DEVIATION**2 + sigma**2
        return MEAN + alpha * DEVIATION**2 / variance * (z - alpha * MEAN), carried

    return predict


def errors(name, levels, steps):
    """The largest error along each schedule.

    The flow keeps the place in the distribution, which at every time is N(α MEAN, α² DEVIATION² + σ²).
    """
    start, answer = (
        alpha * MEAN + jnp.sqrt(alpha**2 * DEVIATION**2 + sigma**2) * NOISE
        for alpha, sigma in (levels(jnp.float64(1)), levels(jnp.float64(0)))
    )
    x = jax.jit(lambda start: sample(name, exact(levels), start, levels, steps, KEY))(start)
    return np.asarray(abs(x - answer).max((1, 2)))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("ddim", 0.9, 1.1), ("heun", 1.8, 2.2), ("dpm++2m", 1.8, 2.2), ("unipc", 2.5, 3.5)],
)
def test_converges_at_its_order(name, least, most, float64):
    """Between two times with some signal and some noise, by doubling the steps twice."""
    coarse, fine = (errors(name, inner, steps) for steps in (50, 200))
    orders = dict(zip(NAMES, np.log2(coarse / fine) / 2, strict=True))
    assert all(least < order < most for order in orders.values()), orders


@pytest.mark.parametrize(
    ("name", "coarse", "fine"),
    [
        ("ddim", 0.1, 0.015),
        ("heun", 0.02, 0.0015),
        ("dpm++2m", 0.02, 0.0015),
        ("unipc", 0.02, 0.0015),
    ],
)
def test_converges_from_pure_noise_to_clean_latents(name, coarse, fine, float64):
    """There the ends' steps, infinite in λ, are of lower order, most so the linear schedule's last."""
    for steps, worst in ((40, coarse), (320, fine)):
        found = errors(name, levels, steps)
        assert (found < worst).all(), dict(zip(NAMES, found, strict=True))


def test_ancestral_sampling_converges_in_distribution():
    noise = jax.random.normal(jax.random.key(1), (len(SCHEDULES), 10_000, 3))
    x = jax.jit(lambda noise: sample("ddpm", exact(levels), noise, levels, 250, KEY))(noise)
    np.testing.assert_allclose(x.mean(1), np.broadcast_to(MEAN[0], (len(x), 3)), atol=0.03)
    np.testing.assert_allclose(x.std(1), np.broadcast_to(DEVIATION[0], (len(x), 3)), rtol=0.06)
    # And not by keeping its place: what it ends at has little to do with what it began with.
    for clip, start in zip(np.asarray(x), np.asarray(noise), strict=True):
        assert abs(np.corrcoef(clip[:, 0], start[:, 0])[0, 1]) < 0.5


# The twins: loops in numpy over (time, α, σ), after the papers.


def nonlinear(z, time, carried):
    """A model whose output depends on all its inputs; it carries its last estimate."""
    x = jnp.sin(z + 0.5) + 0.3 * time * carried - 0.2 * time
    return x, x


def asked(z, time, carried):
    return tuple(np.asarray(a) for a in nonlinear(jnp.asarray(z), time, jnp.asarray(carried)))


def ddim_twin(z, visits):
    """Song et al., equation 12, in x̂ and ε̂."""
    carried = np.zeros_like(z)
    for (time, alpha, sigma), (_, next_alpha, next_sigma) in itertools.pairwise(visits):
        x, carried = asked(z, time, carried)
        z = next_alpha * x + next_sigma * (z - alpha * x) / sigma
    return z


def euler_twin(z, visits):
    """In the flow's variables y = z / (α + σ) and s = σ / (α + σ)."""
    carried = np.zeros_like(z)
    for (time, alpha, sigma), (_, next_alpha, next_sigma) in itertools.pairwise(visits):
        x, carried = asked(z, time, carried)
        velocity = (z - alpha * x) / sigma - x
        y = z / (alpha + sigma) + (next_sigma / (next_alpha + next_sigma) - sigma / (alpha + sigma)) * velocity
        z = y * (next_alpha + next_sigma)
    return z


def heun_twin(z, visits):
    """Karras et al., algorithm 1, in y and s."""
    carried = np.zeros_like(z)
    for (time, alpha, sigma), (next_time, next_alpha, next_sigma) in itertools.pairwise(visits):
        x, carried = asked(z, time, carried)
        velocity = (z - alpha * x) / sigma - x
        width = next_sigma / (next_alpha + next_sigma) - sigma / (alpha + sigma)
        ahead = (z / (alpha + sigma) + width * velocity) * (next_alpha + next_sigma)
        if next_time > 0:
            x, carried = asked(ahead, next_time, carried)
            velocity = (velocity + (ahead - next_alpha * x) / next_sigma - x) / 2
            ahead = (z / (alpha + sigma) + width * velocity) * (next_alpha + next_sigma)
        z = ahead
    return z


def ddpm_twin(z, visits):
    """The posterior of Ho et al., equations 6 and 7, of any α and σ as in Kingma et al. 2021, equations 25 to 28."""
    carried = np.zeros_like(z)
    for step, ((time, alpha, sigma), (_, next_alpha, next_sigma)) in enumerate(itertools.pairwise(visits)):
        x, carried = asked(z, time, carried)
        alpha_between = alpha / next_alpha
        variance_between = sigma**2 - alpha_between**2 * next_sigma**2
        mean = (alpha_between * next_sigma**2 * z + next_alpha * variance_between * x) / sigma**2
        fresh = np.asarray(jax.random.normal(jax.random.fold_in(KEY, step), z.shape))
        z = mean + np.sqrt(variance_between) * next_sigma / sigma * fresh
    return z


def log_snr(visits):
    with np.errstate(divide="ignore"):
        return [np.log(alpha / sigma) for _, alpha, sigma in visits]


def dpm_solver_twin(z, visits):
    """Lu et al., algorithm 2, of first order where a step or the one before it has no finite h."""
    carried, before, lam = np.zeros_like(z), None, log_snr(visits)
    for i in range(len(visits) - 1):
        (time, _, sigma), (_, next_alpha, next_sigma) = visits[i : i + 2]
        x, carried = asked(z, time, carried)
        h, d = lam[i + 1] - lam[i], x
        if i > 0 and np.isfinite(h).all() and np.isfinite(lam[i - 1]).all():
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * before
        z, before = next_sigma / sigma * z - next_alpha * (np.exp(-h) - 1) * d, x
    return z


def unipc_twin(z, visits):
    """Zhao et al., algorithms 7 and 8, by their linear systems R(h) a = φ(h) / B(h) with x-prediction and B₂."""
    carried, lam = np.zeros_like(z), log_snr(visits)

    def solved(h, r, order):
        if order == 1:
            return 0 * h, 0 * np.ones_like(h) + 0.5
        phi_2 = (np.expm1(-h) / -h - 1) / -h
        phi_3 = (phi_2 - 0.5) / -h
        right = np.stack([phi_2, 2 * phi_3], -1) * (-h / np.expm1(-h))[..., None]
        matrix = np.stack([np.stack([np.ones_like(r), np.ones_like(r)], -1), np.stack([r, np.ones_like(r)], -1)], -2)
        both = np.linalg.solve(matrix, right[..., None])[..., 0]
        return both[..., 0], both[..., 1]

    def order(i):
        return 2 if i > 0 and np.isfinite(lam[i - 1]).all() and np.isfinite(lam[i + 1]).all() else 1

    history = []
    for i in range(len(visits)):
        if i > 0:
            # From `start` at time i − 1 to time i: predict, ask, correct.
            (_, _, sigma), (time, next_alpha, next_sigma) = visits[i - 1 : i + 1]
            h = lam[i] - lam[i - 1]
            base = next_sigma / sigma * z - next_alpha * np.expm1(-h) * history[-1]
            b, r, difference = np.expm1(-h), None, 0
            if order(i - 1) == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                difference = (history[-2] - history[-1]) / r
            predicted = base - next_alpha * b * 0.5 * difference
            if i == len(visits) - 1:
                return predicted
            x, carried = asked(predicted, time, carried)
            a_1, a_2 = solved(h if order(i - 1) == 2 else np.zeros_like(h), r, order(i - 1))
            z = base - next_alpha * b * (a_1 * difference + a_2 * (x - history[-1]))
        else:
            x, carried = asked(z, visits[0][0], carried)
        history.append(x)


TWINS = {
    "ddpm": ddpm_twin,
    "ddim": ddim_twin,
    "dpm++2m": dpm_solver_twin,
    "unipc": unipc_twin,
    "euler": euler_twin,
    "heun": heun_twin,
}


def respaced(steps):
    """So many of DDPM's steps 1 to 1000, from the last down, as DiT takes them."""
    stride = 999 / max(steps - 1, 1)
    return [1 + round(999 - stride * number) for number in range(steps)]


def test_ddpm_takes_dits_250_steps():
    assert respaced(250)[:3] == [1000, 996, 992] and respaced(250)[-3:] == [9, 5, 1]

    def predict(z, time, carried):
        count, seen = carried
        return z, (count + 1, seen.at[count].set(time))

    start = (jnp.int32(0), jnp.zeros(250))
    last = {}

    def keep(carried):
        jax.debug.callback(lambda seen: last.update(seen=np.asarray(seen)), carried[1], ordered=True)
        return jnp.zeros((1, 1))

    levels = lambda time: (1 - time, time)  # noqa: E731
    jax.block_until_ready(sample("ddpm", predict, jnp.zeros((1, 1)), levels, 250, KEY, start, keep))
    jax.effects_barrier()
    np.testing.assert_allclose(last["seen"], np.array(respaced(250)) / 1000, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("high", "steps"), [(1.0, 1), (1.0, 2), (1.0, 6), (0.9, 6)])
def test_equals_the_loop(name, high, steps, float64):
    """From pure noise, and from where there is some signal; the latter down to where there is some noise."""
    between = functools.partial(levels, low=1 - high, high=high)
    times = [k / 1000 for k in respaced(steps)] + [0] if name == "ddpm" else np.linspace(1, 0, steps + 1)
    visits = [(time, *(np.asarray(x) for x in between(jnp.float64(time)))) for time in times]
    run = jax.jit(lambda noise: sample(name, nonlinear, noise, between, steps, KEY, jnp.zeros_like(noise)))
    expected = TWINS[name](NOISE, visits)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(run(jnp.asarray(NOISE)), expected, atol=1e-9)


def test_float32_is_enough():
    """The weights of UniPC's corrector lose digits when steps are small: not so many that it matters."""

    def run(noise):
        return np.asarray(jax.jit(lambda noise: sample("unipc", exact(levels), noise, levels, 500, KEY))(noise))

    single = run(jnp.asarray(NOISE, jnp.float32))
    with jax.enable_x64(True):
        double = run(jnp.asarray(NOISE))
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(single, double, atol=3e-5)


@every
def test_memory_is_handed_on_in_order_from_noise_to_data(name):
    steps = 4

    def predict(z, time, carried):
        count, seen = carried
        return jnp.sin(z), (count + 1, seen.at[count].set(time))

    def noting(z, time, carried):
        jax.debug.callback(lambda count, seen: states.append((int(count), np.asarray(seen))), *carried, ordered=True)
        return predict(z, time, carried)

    states = []
    start = (jnp.int32(0), jnp.full((10,), -1.0))
    jax.block_until_ready(sample(name, noting, jnp.asarray(NOISE, jnp.float32), levels, steps, KEY, start))
    jax.effects_barrier()
    times = {"heun": [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], "ddpm": [1, 0.667, 0.334, 0.001]}
    times = times.get(name, [1, 0.75, 0.5, 0.25])
    assert [count for count, _ in states] == list(range(len(times)))
    np.testing.assert_allclose(states[-1][1][: len(times) - 1], times[:-1], atol=1e-6)


@functools.cache
def five_steps(name):
    def run(noise, key, clips):
        def some(time):
            return tuple(x[:clips] for x in levels(time))

        return sample(name, nonlinear, noise, some, 5, key, jnp.zeros_like(noise))

    return jax.jit(run, static_argnums=2)


@every
def test_only_ancestral_sampling_is_random(name):
    noise = jnp.asarray(NOISE, jnp.float32)
    first, again, other = (five_steps(name)(noise, jax.random.key(seed), len(noise)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (name != "ddpm")


@every
def test_a_clip_is_its_own_noise_and_key_alone(name):
    noise = jnp.asarray(NOISE, jnp.float32)
    keys = jax.random.split(KEY, len(noise))
    together = five_steps(name)(noise, keys, len(noise))
    np.testing.assert_allclose(five_steps(name)(noise[:2], keys[:2], 2), together[:2], atol=1e-5)


@pytest.mark.parametrize("key", [KEY, jax.random.split(KEY, 3), jax.random.split(KEY, (3, 2))])
def test_fresh_noise_differs_from_entry_to_entry(key):
    """Of a model that always says 0, along levels that end in noise: only the drawn noise is left."""
    x = sample(
        "ddpm", lambda z, time, carried: (0 * z, carried), jnp.zeros((3, 2, 50)), lambda t: (1 - t, 0.5 + t), 2, key
    )
    assert len(np.unique(x.round(6))) > 290
    np.testing.assert_allclose(np.corrcoef(x.reshape(6, 50)), np.eye(6), atol=0.5)


@every
def test_one_step_is_the_estimate_at_pure_noise(name):
    noise = jnp.asarray(NOISE, jnp.float32)
    x = sample(name, nonlinear, noise, levels, 1, KEY, jnp.zeros_like(noise))
    np.testing.assert_allclose(x, nonlinear(noise, 1.0, 0.0)[0], atol=1e-6)


@every
def test_a_plain_schedule_for_all(name):
    """Scalars for α and σ, latents of any shape."""
    noise = jnp.asarray(NOISE, jnp.float32).reshape(5, 2, 2, 3)
    x = sample(name, lambda z, time, carried: (jnp.tanh(z), carried), noise, Schedule("cosine"), 3, KEY)
    assert x.shape == noise.shape
    assert jnp.isfinite(x).all()
