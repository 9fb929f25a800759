"""The objective equals a plain sum over the values that count, clip by clip; estimates carry no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.config import build
from walt_jax.diffusion.motion_error import MotionConfig
from walt_jax.diffusion.objective import DiffusionConfig, diffusion_loss, draw
from walt_jax.diffusion.parameterization import target
from walt_jax.diffusion.schedule import Schedule
from walt_jax.diffusion.times import TimesConfig
from walt_jax.errors import UserError

# Two packs of seven tokens: three clips, and two with an unused slot; -1 is padding.
SEGMENTS = np.array([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, -1, -1]])
TOKENS = np.array([[3, 2, 1], [1, 4, 0]], np.float32)
VALID = SEGMENTS >= 0
PACKS, CLIPS, PATCH = 2, 3, 4
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(2, 7, PATCH)).astype(np.float32) * VALID[..., None]
COMPLEXITY = np.array([[0.2, 0.7, 1.1], [0.0, 1.9, 0.4]], np.float32)
COUNTED = ((RNG.random(LATENTS.shape) < 0.7) & VALID[..., None]).astype(np.float32)

LINEAR, PLAIN, COSINE, FLOW = (
    Schedule("linear"),
    Schedule("linear", zero_terminal_snr=False),
    Schedule("cosine"),
    Schedule("flow"),
)
SCHEDULES = (LINEAR, FLOW, Schedule("cosine", shift=2.0))
PAIRS = [(kind, schedule) for kind in ("x0", "v", "flow") for schedule in SCHEDULES] + [("eps", PLAIN), ("v", PLAIN)]
# The estimate of the clean latents from a prediction about z, each clip with α and σ of its own.
CLEAN = {
    "eps": lambda a, z, alpha, sigma: (z - sigma * a) / alpha,
    "x0": lambda a, z, alpha, sigma: a,
    "v": lambda a, z, alpha, sigma: (alpha * z - sigma * a) / (alpha**2 + sigma**2),
    "flow": lambda a, z, alpha, sigma: (z - sigma * a) / (alpha + sigma),
}
TARGET = {
    "eps": lambda x, noise, alpha, sigma: noise,
    "x0": lambda x, noise, alpha, sigma: x,
    "v": lambda x, noise, alpha, sigma: alpha * noise - sigma * x,
    "flow": lambda x, noise, alpha, sigma: noise - x,
}
OF_PAIRS = pytest.mark.parametrize(("kind", "schedule"), PAIRS, ids=lambda x: getattr(x, "name", x))


def spread(values):
    """Zeros for what fills up, as a pack's layout has them."""
    return jnp.einsum("bns,bsk->bnk", np.float32(SEGMENTS[..., None] == np.arange(CLIPS)), values)


class Recorder:
    """A model that notes what it is asked; its answer is arbitrary, and depends on all of that."""

    def __init__(self):
        self.calls = []

    def __call__(self, noisy, time, estimate):
        own = spread(time[..., None])
        answer = 0.5 * noisy - jnp.cos(7 * own) * estimate + own
        self.calls.append([np.asarray(x, np.float64) for x in (noisy, time, estimate, answer)])
        return answer


def loss(config, model, seed=3, latents=LATENTS, counted=COUNTED, complexity=COMPLEXITY):
    draws = draw(jax.random.key(seed), latents.shape, TOKENS.shape, config)
    return diffusion_loss(model, jnp.asarray(latents), counted, jnp.asarray(TOKENS), complexity, spread, draws, config)[
        0
    ]


def levels(config, time):
    """α and σ of each clip [b, s], shifted by hand: log SNR falls by twice the shift's logarithm."""
    alpha, sigma = (np.asarray(x, np.float64) for x in config.schedule(jnp.asarray(time, jnp.float32)))
    if config.base_tokens:
        sigma = sigma * np.sqrt(np.maximum(TOKENS, 1) / config.base_tokens)
        total = alpha + sigma if config.schedule.name == "flow" else np.hypot(alpha, sigma)
        alpha, sigma = alpha / total, sigma / total
    return alpha, sigma


def tokens_of_clips():
    """(pack, place, clip) of every token of a clip."""
    return [(b, n, SEGMENTS[b, n]) for b in range(PACKS) for n in range(SEGMENTS.shape[1]) if SEGMENTS[b, n] >= 0]


def noise_of(config, noisy, time):
    """The noise that a call's latents have in them, zeros where they fill up."""
    alpha, sigma = levels(config, time)
    noise = np.zeros(noisy.shape)
    for b, n, s in tokens_of_clips():
        noise[b, n] = (noisy[b, n] - alpha[b, s] * LATENTS[b, n]) / sigma[b, s]
    return noise


def twin(config, call):
    """The loss token by token, from what the model was asked and what it said."""
    noisy, time, _, answer = call
    alpha, sigma = levels(config, time)
    noise, kind = noise_of(config, noisy, time), config.parameterization
    total = count = 0.0
    for b, n, s in tokens_of_clips():
        level = alpha[b, s], sigma[b, s]
        if config.min_snr:  # then what counts is the error of the clean latents, as much as the SNR says
            error = CLEAN[kind](answer[b, n], noisy[b, n], *level) - LATENTS[b, n]
            error = error * np.sqrt(min((level[0] / level[1]) ** 2, config.min_snr))
        else:
            error = answer[b, n] - TARGET[kind](LATENTS[b, n].astype(np.float64), noise[b, n], *level)
        total += (error**2 * COUNTED[b, n]).sum()
        count += COUNTED[b, n].sum()
    return total / count


OPTIONS = {
    "plain": {},
    "conditioned": {"self_conditioning": 0.5},
    "shifted": {"base_tokens": 2},
    "weighted": {"min_snr": 1.5},
    "adapted": {"adaptive": 0.8},
    "all": {"self_conditioning": 1.0, "base_tokens": 2, "min_snr": 1.5, "adaptive": 0.8},
}


@OF_PAIRS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_the_mean_squared_error_of_values_that_count(kind, schedule, options):
    config, model = DiffusionConfig(schedule, kind, **options), Recorder()
    value = loss(config, model)
    assert value == pytest.approx(twin(config, model.calls[-1]), rel=1e-3)


def test_the_noise_is_normal_and_the_same_whatever_is_predicted_and_at_what_level():
    drawn = []
    for options in OPTIONS.values():
        for kind, schedule in PAIRS[::3]:
            config, model = DiffusionConfig(schedule, kind, **options), Recorder()
            loss(config, model)
            drawn.append(noise_of(config, *model.calls[-1][:2])[VALID])
    for noise in drawn[1:]:
        np.testing.assert_allclose(noise, drawn[0], atol=2e-3)
    assert abs(drawn[0].mean()) < 0.4
    assert 0.7 < drawn[0].std() < 1.3
    assert len(np.unique(drawn[0].round(6))) == drawn[0].size  # no noise is used twice


def test_each_clip_of_a_pack_has_a_time_of_its_own():
    """Stratified over all places of the batch."""
    model = Recorder()
    loss(DiffusionConfig(COSINE), model)
    ((_, time, _, _),) = model.calls
    assert time.shape == (PACKS, CLIPS)
    np.testing.assert_allclose(np.diff(np.sort(time.ravel())), 1 / 6, atol=1e-5)


def test_times_follow_the_config():
    late = TimesConfig("logit_normal", mean=4.0, std=0.1)
    model = Recorder()
    loss(DiffusionConfig(COSINE, times=late), model)
    assert (model.calls[0][1] > 0.95).all()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=lambda schedule: schedule.name)
def test_a_complex_clip_has_more_noise_and_the_model_is_told(schedule):
    """ᾱ is raised to the power 1 + strength · complexity; the twin checks that the noise follows the model's time."""
    plain, adapted = Recorder(), Recorder()
    loss(DiffusionConfig(schedule), plain, complexity=None)
    loss(DiffusionConfig(schedule, adaptive=0.8), adapted)
    (before, after) = (np.asarray(schedule(jnp.float32(m.calls[0][1]))[0], np.float64) for m in (plain, adapted))
    np.testing.assert_allclose(after, before ** (1 + 0.8 * COMPLEXITY), atol=1e-4)
    assert (adapted.calls[0][1] >= plain.calls[0][1]).all()
    assert (adapted.calls[0][1] > plain.calls[0][1] + 0.01).any()


@OF_PAIRS
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_the_loss_of_the_exact_prediction_is_zero(kind, schedule, options):
    config = DiffusionConfig(schedule, kind, **options)

    def exact(noisy, time, estimate):
        alpha, sigma = (spread(jnp.float32(level)[..., None]) for level in levels(config, time))
        noise = (noisy - alpha * LATENTS) / jnp.where(VALID[..., None], sigma, 1)
        return target(kind, LATENTS, noise, alpha, sigma)

    assert loss(config, exact) == pytest.approx(0, abs=1e-5)


@OF_PAIRS
def test_the_estimate_is_the_models_own_first_guess(kind, schedule):
    config, model = DiffusionConfig(schedule, kind, self_conditioning=1.0, base_tokens=2), Recorder()
    loss(config, model)
    (noisy, time, none, first), (again, same_time, estimate, _) = model.calls
    np.testing.assert_array_equal(none, np.zeros(LATENTS.shape))
    np.testing.assert_array_equal(again, noisy)
    np.testing.assert_array_equal(same_time, time)
    alpha, sigma = levels(config, time)
    for b, n, s in tokens_of_clips():
        guess = CLEAN[kind](first[b, n], noisy[b, n], alpha[b, s], sigma[b, s])
        np.testing.assert_allclose(estimate[b, n], guess, rtol=1e-3, atol=1e-4)


def test_without_self_conditioning_the_model_is_asked_once():
    model = Recorder()
    loss(DiffusionConfig(LINEAR), model)
    ((_, _, estimate, _),) = model.calls
    np.testing.assert_array_equal(estimate, np.zeros(LATENTS.shape))


def test_no_gradient_flows_through_the_estimate():
    """Of the model w₁ z + w₂ estimate; by hand, with the estimate taken as a constant."""
    config, weights = DiffusionConfig(COSINE, self_conditioning=1.0), (0.3, 0.7)
    model = Recorder()
    loss(config, model)
    noisy, time = model.calls[0][:2]
    alpha, sigma = levels(config, time)
    noise = noise_of(config, noisy, time)
    by_hand = np.zeros(2)
    for b, n, s in tokens_of_clips():
        z, (a, s_) = noisy[b, n], (alpha[b, s], sigma[b, s])
        estimate = a * z - s_ * weights[0] * z
        error = weights[0] * z + weights[1] * estimate - (a * noise[b, n] - s_ * LATENTS[b, n])
        by_hand += [(2 * error * term * COUNTED[b, n]).sum() / COUNTED.sum() for term in (z, estimate)]

    def of_weights(weights):
        return loss(config, lambda noisy, time, estimate: weights[0] * noisy + weights[1] * estimate)

    np.testing.assert_allclose(jax.grad(of_weights)(jnp.array(weights)), by_hand, rtol=1e-3)


@functools.cache
def drawn(count=1000):
    """Of a model that says v = 0 to `count` keys: times, whether all or none of a token saw an estimate, and losses."""

    def one(key):
        seen = []

        def denoise(noisy, time, estimate):
            seen.append((time, (estimate != 0).all(-1), (estimate == 0).all(-1)))
            return 0 * noisy

        config = DiffusionConfig(COSINE, self_conditioning=0.5)
        draws = draw(key, LATENTS.shape, TOKENS.shape, config)
        value, _ = diffusion_loss(denoise, LATENTS, COUNTED, TOKENS, None, spread, draws, config)
        return *seen[-1], value

    return [np.asarray(x) for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))]


def test_the_expected_loss_of_a_model_that_says_nothing():
    """E v² = α² + σ² x² over the noise, so with times spread evenly the mean is that over t."""
    *_, losses = drawn()
    # The mean of cos² and of sin² over a quarter of a circle is a half.
    expected = 0.5 + 0.5 * (LATENTS**2 * COUNTED).sum() / COUNTED.sum()
    assert losses.mean() == pytest.approx(expected, rel=0.05)


def of_clips(times, tokens):
    """[keys, clips] of both."""
    firsts = [(b, SEGMENTS[b].tolist().index(s), s) for b in range(PACKS) for s in range(CLIPS) if TOKENS[b, s]]
    return (
        np.stack([times[:, b, s] for b, _, s in firsts], -1),
        np.stack([tokens[:, b, n] for b, n, _ in firsts], -1),
    )


def test_a_whole_clip_sees_its_estimate_or_none_of_it():
    _, seen, unseen, _ = drawn()
    assert (seen != unseen)[:, VALID].all()
    for b, n, s in tokens_of_clips():
        first = SEGMENTS[b].tolist().index(s)
        np.testing.assert_array_equal(seen[:, b, n], seen[:, b, first])


def test_as_many_clips_see_their_estimate_as_asked_for_whatever_their_time_and_neighbours():
    time, chosen = of_clips(*drawn()[:2])
    assert (abs(chosen.mean(0) - 0.5) < 0.05).all()
    both = np.corrcoef(np.concatenate([time, chosen], axis=1).T)
    assert (abs(both[:5, 5:]) < 0.1).all()
    assert (abs(both[5:, 5:] - np.eye(5)) < 0.1).all()  # each clip is drawn for itself


def test_each_clips_time_is_uniform_over_steps():
    time, _ = of_clips(*drawn()[:2])
    for clip in time.T:
        counts, _ = np.histogram(clip, 10, (0, 1))
        assert (abs(counts - 100) < 40).all()


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_what_fills_up_or_is_given_does_not_change_loss_or_gradient(options):
    """Latents that don't count may be anything, and so may the model's answer there."""
    config = DiffusionConfig(LINEAR, **options)

    def value(weight, outside):
        def denoise(noisy, time, estimate):
            # Each value for itself, so that what doesn't count can have an effect only through the loss.
            return weight * noisy + jnp.tanh(estimate) + outside * (1 - COUNTED)

        return loss(config, denoise, latents=LATENTS + outside * (1 - COUNTED))

    plain, other = (jax.value_and_grad(value)(jnp.float32(0.4), outside) for outside in (0.0, 100.0))
    assert np.isfinite(plain).all()
    np.testing.assert_array_equal(plain, other)


def test_a_batch_in_which_nothing_counts_costs_nothing():
    assert loss(DiffusionConfig(LINEAR), Recorder(), counted=np.zeros_like(COUNTED)) == 0


def test_keys_are_all_that_is_random():
    config = DiffusionConfig(FLOW, self_conditioning=0.5)
    first, again, other = (loss(config, Recorder(), seed) for seed in (4, 4, 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_noise_alone_is_no_target_where_there_is_no_signal_at_the_end(schedule):
    knobs = {"schedule": {"name": schedule}, "parameterization": "eps"}
    with pytest.raises(UserError, match="parameterization='eps' does not determine"):
        build(DiffusionConfig, knobs, "config.diffusion")


def test_from_a_config():
    knobs = {"schedule": {"name": "linear", "zero_terminal_snr": False}, "parameterization": "eps", "min_snr": 5.0}
    assert build(DiffusionConfig, knobs, "diffusion") == DiffusionConfig(PLAIN, "eps", min_snr=5.0)
    with pytest.raises(UserError, match="parameterization"):
        build(DiffusionConfig, {"schedule": {"name": "linear"}, "parameterization": "y"}, "diffusion")
    with pytest.raises(UserError, match="self_conditioning"):
        build(DiffusionConfig, {"schedule": {"name": "linear"}, "self_conditioning": 1.5}, "diffusion")
    assert DiffusionConfig(FLOW).shift(jnp.array([[4.0]])) is None
    np.testing.assert_allclose(DiffusionConfig(FLOW, base_tokens=4).shift(jnp.array([[16.0, 0.0]])), [[2.0, 0.5]])


@pytest.mark.parametrize("multiscale", [1, 2])
def test_coarse_errors_count_as_their_squares_means_with_twice_the_weight_of_finer_ones(multiscale):
    latents = RNG.normal(size=(2, 16, 1)).astype(np.float32)  # 4 × 4
    config = DiffusionConfig(LINEAR, multiscale=multiscale)
    differences = []

    def model(noisy, time, estimate):
        answer = 0.3 * noisy
        return answer

    def clips(values):
        differences.append(np.asarray(values))
        return values.reshape(2, 1, 4, 4, 1)

    tokens = np.full((2, 1), 16, np.float32)
    draws = draw(jax.random.key(3), latents.shape, tokens.shape, config)
    found, _ = diffusion_loss(model, latents, np.ones_like(latents), tokens, None, lambda x: x, draws, config, clips)
    error = differences[0].reshape(2, 4, 4)
    expected, weights = 0.0, [2.0 ** (level - multiscale) for level in range(multiscale + 1)]
    for level, weight in enumerate(weights):
        size, squares = 2**level, []
        for clip in error:
            for y in range(0, 4, size):
                for x in range(0, 4, size):
                    squares.append(clip[y : y + size, x : x + size].mean() ** 2)
        expected += weight * np.mean(squares)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_errors_of_motion_are_those_of_differences_in_time():
    """A constant error has none; independent ones have about as much as the loss; of each clip by loops."""
    latents = RNG.normal(size=(2, 24, 1)).astype(np.float32)  # 6 × 2 × 2
    config = DiffusionConfig(LINEAR)
    errors = RNG.normal(size=(2, 6, 2, 2, 1)).astype(np.float32)
    draws = draw(jax.random.key(3), latents.shape, (2, 1), config)
    counted = np.ones_like(latents)
    counted[0, :4] = 0  # the first clip's first frame is observed

    def loss(errors, motion):
        def model(noisy, time, estimate):
            alpha, sigma = config.schedule(time)
            right = target("v", latents, draws.noise, alpha[..., None], sigma[..., None])
            return right + errors.reshape(latents.shape)

        tokens, clips = np.full((2, 1), 24, np.float32), lambda values: values.reshape(2, 6, 2, 2, 1)
        return diffusion_loss(model, latents, counted, tokens, None, lambda x: x, draws, config, clips, motion)[0]

    own = errors * counted.reshape(errors.shape)
    first = sum(((own[:, t + 1] - own[:, t]) ** 2).sum() for t in range(5)) / 2
    second = sum(((own[:, t + 2] - 2 * own[:, t + 1] + own[:, t]) ** 2).sum() for t in range(4)) / 6
    plain = loss(errors, MotionConfig())
    np.testing.assert_allclose(
        loss(errors, MotionConfig(0.3, 0.7)) - plain, (0.3 * first + 0.7 * second) / 44, rtol=1e-3
    )
    still = np.broadcast_to(errors[1:, :1], errors.shape) * np.array([0, 1]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(loss(still, MotionConfig(1.0, 1.0)), loss(still, MotionConfig()), rtol=1e-5)
