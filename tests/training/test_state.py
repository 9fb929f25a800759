"""A train step is the gradient, the optimizer and the average by hand; its randomness is the key and the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.training.state import TrainState, make_train_step

DECAY = 0.6


class NoisyTask:
    """(w · x + b + frozen + noise + seen / 8 − y)², so that every argument matters; `seen` counts steps."""

    def gradients(self, params, moving, frozen, batch, key, step):
        noise = jax.random.normal(key)

        def loss(params):
            prediction = batch["x"] @ params["w"] + jnp.broadcast_to(params["b"], batch["y"].shape) + frozen + noise
            return jnp.square(prediction + moving["seen"] / 8 - batch["y"]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return gradients, {"seen": moving["seen"] + 1}, {"loss": value, "noise": noise, "asked": step}

    def served(self, params, moving):
        return {**params, "seen": moving["seen"]}


TASK = NoisyTask()
OPTIMIZER = optax.adam(0.1)
STEP = make_train_step(TASK, OPTIMIZER, DECAY)
BATCH = {
    "x": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
    "y": jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32),
}
FROZEN = jnp.float32(0.5)


def fresh():
    params = {"w": jnp.array([1.0, -1, 2]), "b": jnp.array(0.3)}
    return TrainState.create(params, {"seen": jnp.zeros(())}, TASK, OPTIMIZER, DECAY)


def run(steps, key, state=None):
    """The state after the steps, and each one's metrics."""
    state, metrics = state or fresh(), []
    for _ in range(steps):
        state, step_metrics = STEP(state, FROZEN, BATCH, jax.random.key(key))
        metrics.append({name: float(value) for name, value in step_metrics.items()})
    return state, metrics


def test_a_new_state():
    state = fresh()
    assert int(state.step) == 0
    for name, parameter in {**state.params, **state.moving}.items():
        average = state.ema[name]
        np.testing.assert_array_equal(average, parameter)
        assert average.unsafe_buffer_pointer() != parameter.unsafe_buffer_pointer()  # both are donated


def test_steps_by_hand():
    """Adam (Kingma and Ba 2015) in numpy, and an average that follows closely at first."""
    x, y = (np.asarray(BATCH[name], np.float64) for name in ("x", "y"))
    w, average = np.array([1.0, -1, 2, 0.3]), np.array([1.0, -1, 2, 0.3, 0])
    m, v, state = np.zeros(4), np.zeros(4), fresh()
    for step in range(12):
        state, metrics = STEP(state, FROZEN, BATCH, jax.random.key(7))
        noise = float(jax.random.normal(jax.random.fold_in(jax.random.key(7), step)))
        error = x @ w[:3] + w[3] + 0.5 + noise + step / 8 - y
        g = np.append(2 * (error[:, None] * x).mean(0), 2 * error.mean())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.1 * m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        decay = min(DECAY, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.append(w, step + 1)
        assert float(metrics["loss"]) == pytest.approx(np.square(error).mean(), rel=1e-4)
        assert float(metrics["gradient_norm"]) == pytest.approx(np.linalg.norm(g), rel=1e-4)
        assert float(metrics["noise"]) == pytest.approx(noise, abs=1e-6)
        assert int(state.step) == float(state.moving["seen"]) == step + 1
        assert int(metrics["asked"]) == step
        np.testing.assert_allclose(np.append(state.params["w"], state.params["b"]), w, rtol=1e-4, atol=1e-5)
        ema = np.concatenate([state.ema["w"], [state.ema["b"], state.ema["seen"]]])
        np.testing.assert_allclose(ema, average, rtol=1e-4, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 4), st.integers(1, 4))
def test_a_resumed_run_draws_and_ends_as_an_uninterrupted_one(key, before, after):
    whole, metrics = run(before + after, key)
    stopped, first = run(before, key)
    stopped = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), stopped)  # as if through a file
    resumed, second = run(after, key, stopped)
    assert first + second == metrics
    for mine, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_each_step_and_each_key_draws_anew():
    noises = [row["noise"] for key in (1, 2) for row in run(5, key)[1]]
    assert len(set(noises)) == 10


def test_the_state_is_donated_and_the_rest_is_not():
    state, batch, frozen, key = fresh(), jax.tree.map(jnp.copy, BATCH), jnp.copy(FROZEN), jax.random.key(0)
    new, _ = STEP(state, frozen, batch, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, frozen, batch, key)))


def test_without_a_decay_no_average_is_kept_and_the_parameters_are_served():
    step = make_train_step(TASK, OPTIMIZER, 0.0)
    params = {"w": jnp.array([1.0, -1, 2]), "b": jnp.array(0.3)}
    state, other = TrainState.create(params, {"seen": jnp.zeros(())}, TASK, OPTIMIZER, 0.0), fresh()
    for _ in range(3):
        state, _ = step(state, FROZEN, BATCH, jax.random.key(7))
        other, _ = STEP(other, FROZEN, BATCH, jax.random.key(7))
    assert state.ema is None
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(other)) - 3
    for name, leaf in state.served(TASK).items():
        np.testing.assert_array_equal(leaf, {**other.params, **other.moving}[name])
    assert other.served(TASK) is other.ema
