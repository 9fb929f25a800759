"""An optimizer's state in bfloat16 is right on average, and in the host's memory it is the same state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from walt_jax.errors import UserError
from walt_jax.parallel.memory import device_bytes
from walt_jax.parallel.mesh import MeshConfig, make_mesh
from walt_jax.training import moments
from walt_jax.training.moments import HOST, in_bfloat16, stochastically_rounded
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer
from walt_jax.training.state import TrainState, abstract_state, make_train_step, state_shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
GRADIENTS = {"w": 0.3 * jnp.ones((4, 3)), "b": jnp.array([1.0, -2, 3])}


def test_rounding_is_right_on_average_and_to_a_neighbour():
    x = jnp.full((20_000,), 1 + 0.3 / 128, jnp.float32)  # neighbours: 1 and 1 + 1/128
    found = np.asarray(stochastically_rounded(x, jax.random.key(0)), np.float64)
    assert set(np.unique(found)) == {1, 1 + 1 / 128}
    assert abs((found - 1).mean() * 128 - 0.3) < 0.02
    exact = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(stochastically_rounded(exact, jax.random.key(0)).astype(jnp.float32), exact)
    np.testing.assert_array_equal(found, np.asarray(stochastically_rounded(x, jax.random.key(0)), np.float64))


def decayed(optimizer, steps=300):
    """Adam's second moment after a gradient of 1 and then so many of 0."""
    params = {"w": jnp.zeros(200)}
    _, state = optimizer.update({"w": jnp.ones(200)}, optimizer.init(params), params)

    def step(state, _):
        return optimizer.update({"w": jnp.zeros(200)}, state, params)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(state)
    return next(node for node in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "nu")) if hasattr(node, "nu")).nu[
        "w"
    ]


def test_a_second_moment_in_bfloat16_falls_as_it_does_in_float32():
    adam = optax.adam(0.1, b2=0.999)
    wide, narrow = decayed(adam), decayed(in_bfloat16(adam))
    assert narrow.dtype == jnp.bfloat16
    assert wide[0] < 0.75 * 0.001
    np.testing.assert_allclose(narrow.astype(jnp.float32).mean(), wide.mean(), rtol=0.01)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_in_bfloat16_takes_half_and_gives_nearly_the_same_updates(name):
    wide, narrow = (
        make_optimizer(OptimizerConfig(name, 0.1, state_dtype=dtype), 5, PARAMS) for dtype in ("float32", "bfloat16")
    )
    states = [optimizer.init(PARAMS) for optimizer in (wide, narrow)]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim) for state in states]
    assert sizes[1] * 2 == sizes[0]
    for _ in range(3):
        (expected, states[0]), (found, states[1]) = (
            jax.jit(optimizer.update)(GRADIENTS, state, PARAMS)
            for optimizer, state in zip((wide, narrow), states, strict=True)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.03, atol=1e-4), found, expected)


class Square:
    """A task of two parameters: their distance from the batch."""

    def init(self, key):
        return {name: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim) for name, leaf in PARAMS.items()}, {}

    def gradients(self, params, moving, frozen, batch, key, step):
        gradients = jax.tree.map(lambda leaf: leaf - batch, params)
        return gradients, moving, {"loss": optax.tree.norm(gradients)}

    def served(self, params, moving):
        return params


def trained(optimizer, steps=3):
    """A state that was made, and divided, as a run's is."""
    task, mesh = Square(), make_mesh(MeshConfig(), jax.devices()[:1])
    divided = state_shardings(abstract_state(task, optimizer, mesh, (), 0.9))

    def create():
        return TrainState.create(PARAMS, {}, task, optimizer, 0.9)

    state = jax.jit(create, out_shardings=divided)()
    step = make_train_step(task, optimizer, 0.9, divided=divided)
    for _ in range(steps):
        state, _ = step(state, None, jnp.float32(0.3), jax.random.key(0))
    return state


def test_state_in_the_hosts_memory_stays_there_and_training_is_the_same():
    plain, hosted = (
        trained(make_optimizer(OptimizerConfig("adamw", 0.1, offload=o), 5, PARAMS)) for o in (False, True)
    )
    for mine, other in zip(jax.tree.leaves(hosted), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(hosted.opt_state) if leaf.ndim} == {HOST}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((hosted.params, hosted.ema))} == {"device"}
    assert device_bytes(plain) - device_bytes(hosted) == 2 * 4 * 15


def test_a_platform_without_that_memory_is_named(monkeypatch):
    monkeypatch.setattr(moments, "HOST", "no_such_memory")
    with pytest.raises(
        UserError, match=r"optimizer\.offload keeps .* no_such_memory, which cpu does not have; leave it"
    ):
        make_optimizer(OptimizerConfig("adamw", 0.1, offload=True), 5, PARAMS)
