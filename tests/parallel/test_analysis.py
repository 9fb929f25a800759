"""Operations and memory by analysis: by hand, and a model's operations as XLA counts them."""

import jax
import jax.numpy as jnp
import pytest

from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.parallel.analysis import operations, peak_bytes, traced
from walt_jax.parallel.cost import flops

X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)


def test_products_know_their_sides_and_bytes():
    stack = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32)
    (plain,) = operations(traced(lambda x, w: x @ w, X, W))
    assert plain.products[0].sides == (8, 16, 16)
    assert plain.hbm_bytes == 4 * (8 * 16 + 16 * 16 + 8 * 16)
    (batched,) = operations(traced(lambda x: jnp.einsum("bqd,bkd->bqk", x, x), stack))
    assert batched.products[0].sides == (8, 8, 16)
    assert batched.flops == 2 * 5 * 8 * 8 * 16


def test_a_scan_counts_as_often_as_it_runs():
    function = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]  # noqa: E731
    assert [o.times for o in operations(traced(function, X, W))] == [7]


BYTES = 8 * 16 * 4  # of X


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda x, w: jnp.tanh(x), 1),
        (lambda x, w: jnp.tanh(jnp.sin(x)), 2),  # an operation's result and its operand
        (lambda x, w: jnp.tanh(jnp.sin(jnp.cos(x))), 2),
        (lambda x, w: (jnp.sin(x), jnp.cos(x), jnp.tanh(x)), 3),  # results stay
        (lambda x, w: jax.lax.scan(lambda x, _: (jnp.sin(x), x), x, length=7)[1], 8),
    ],
)
def test_peak_memory_of_chains(function, arrays):
    assert peak_bytes(traced(function, X, W)) == arrays * BYTES


def test_recomputing_takes_less_memory_and_more_operations():
    def loss(x, w, policy):
        body = jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w), policy=policy)
        return jnp.square(jax.lax.scan(lambda x, _: (body(x, w), None), x, length=9)[0]).sum()

    def of(policy):
        jaxpr = traced(jax.grad(lambda x, w: loss(x, w, policy)), X, W)
        return peak_bytes(jaxpr), sum(o.flops for o in operations(jaxpr))

    saved, recomputed = (
        of(p) for p in (jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable)
    )
    assert recomputed[0] < saved[0] and recomputed[1] > saved[1]


@pytest.mark.parametrize("gradients", [False, True])
def test_an_unrolled_models_operations_are_xlas_within_one_percent(gradients):
    """XLA also counts element-wise operations: few in a wide model. Lowered only, nothing is compiled or computed."""
    config = WaltConfig(
        dim=2048, heads=16, layers=2, windows=((1, 8, 8), (4, 4, 4)), cross_attention=False, classes=10, relative="none"
    )
    model, layout = Denoiser(config, (4, 8, 8)), Layout(grid=(4, 8, 8))
    noisy, time = jnp.zeros((1, 256, 8)), jnp.zeros((1, 1))
    condition = Condition(label=jnp.zeros((1, 1), jnp.int32))
    params = unboxed(jax.eval_shape(model.init, jax.random.key(0), noisy, time, condition, layout))

    def forward(params, noisy):
        return model.apply(params, noisy, time, condition, layout)

    function = jax.grad(lambda params, noisy: forward(params, noisy).sum()) if gradients else forward
    counted = flops(function, params, noisy)
    assert counted == pytest.approx(jax.jit(function).lower(params, noisy).cost_analysis()["flops"], rel=0.01)
