"""Counts of operations equal those by hand, and XLA's own where a program is nothing but a product."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.parallel.cost import flops, flops_by_module, module_of


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


X, W = array(5, 6), array(6, 6)
PRODUCT = 2 * 5 * 6 * 6  # of X and W


def product(x, w):
    return x @ w


@pytest.mark.parametrize(
    ("pattern", "left", "right", "expected"),
    [
        ("ij,jk->ik", (3, 4), (4, 5), 2 * 3 * 4 * 5),
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 5), 2 * 2 * 3 * 4 * 5),
        ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5), 2 * 2 * 3 * 4 * 6 * 5),
        ("ij,ij->", (3, 4), (3, 4), 2 * 3 * 4),
        ("bijc,cijd->bd", (2, 3, 4, 5), (5, 3, 4, 6), 2 * 2 * 3 * 4 * 5 * 6),
        ("i,j->ij", (3,), (4,), 2 * 3 * 4),
    ],
)
def test_matrix_products(pattern, left, right, expected):
    """Twice the product of all axes, each once."""
    assert flops(lambda x, y: jnp.einsum(pattern, x, y), array(*left), array(*right)) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.permutations("bijk"))
def test_any_order_of_axes_costs_the_same(sizes, order):
    size = dict(zip("bijk", sizes, strict=True))
    left, right, out = ("".join(axis for axis in order if axis in axes) for axes in ("bij", "bjk", "bik"))
    count = flops(
        lambda x, y: jnp.einsum(f"{left},{right}->{out}", x, y),
        *(array(*(size[axis] for axis in axes)) for axes in (left, right)),
    )
    assert count == 2 * np.prod(sizes)


def convolution(x, kernel, **options):
    axes = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=axes, **options)


# Without padding, of which XLA leaves out the products with zeros and the count by hand doesn't.
CONVOLUTIONS = {
    "plain": ((2, 8, 9, 3), (3, 2, 3, 5), {"window_strides": (1, 1)}, 2 * (2 * 6 * 8 * 5) * (3 * 2 * 3)),
    "strided": ((2, 9, 9, 4), (3, 3, 4, 6), {"window_strides": (2, 2)}, 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)),
    "grouped": (
        (2, 5, 5, 8),
        (3, 3, 2, 12),
        {"window_strides": (1, 1), "feature_group_count": 4},
        2 * (2 * 3 * 3 * 12) * (3 * 3 * 2),
    ),
    "one tap a channel": (
        (1, 6, 6, 8),
        (3, 3, 1, 8),
        {"window_strides": (1, 1), "feature_group_count": 8},
        2 * (4 * 4 * 8) * (3 * 3),
    ),
    "of clips": ((1, 5, 6, 7, 3), (3, 3, 3, 3, 4), {"window_strides": (2, 1, 1)}, 2 * (2 * 4 * 5 * 4) * (27 * 3)),
    "dilated": (
        (1, 9, 9, 2),
        (3, 3, 2, 3),
        {"window_strides": (1, 1), "rhs_dilation": (2, 2)},
        2 * (5 * 5 * 3) * (3 * 3 * 2),
    ),
}
OF_CONVOLUTIONS = pytest.mark.parametrize(
    ("x", "kernel", "options", "expected"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)


@OF_CONVOLUTIONS
def test_convolutions(x, kernel, options, expected):
    """Twice the values out, times taps, times the channels that one of them sees."""
    function = functools.partial(convolution, padding="VALID", **options)
    assert flops(function, array(*x), array(*kernel)) == expected
    assert xla_flops(function, array(*x), array(*kernel)) == expected


@OF_CONVOLUTIONS
def test_a_convolutions_kernel_gradient_costs_as_much_as_the_convolution(x, kernel, options, expected):
    def gradient(x, kernel, cotangent):
        _, pull = jax.vjp(lambda kernel: convolution(x, kernel, padding="VALID", **options), kernel)
        return pull(cotangent)

    out = jax.eval_shape(functools.partial(convolution, padding="VALID", **options), array(*x), array(*kernel))
    # The forward pass of the vjp is traced as well, though its result is not needed.
    both = flops(gradient, array(*x), array(*kernel), out)
    assert both - flops(functools.partial(convolution, padding="VALID", **options), array(*x), array(*kernel)) == (
        pytest.approx(expected, rel=0.01)
    )


def test_a_kernels_gradient_by_hand_and_by_xla():
    """Each of 3 × 3 × 4 × 6 values sees the 2 · 6 · 7 places of its two channels."""

    def gradient(x, cotangent):
        pull = jax.linear_transpose(lambda kernel: convolution(x, kernel, window_strides=(1, 1), padding="VALID"), w)
        return pull(cotangent)

    w = array(3, 3, 4, 6)
    arguments = array(2, 8, 9, 4), array(2, 6, 7, 6)
    assert flops(gradient, *arguments) == 2 * (3 * 3 * 4 * 6) * (2 * 6 * 7)
    assert xla_flops(gradient, *arguments) == 2 * (3 * 3 * 4 * 6) * (2 * 6 * 7)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
def test_a_convolutions_input_gradient_costs_as_much_as_the_convolution(strides):
    """The zeros between the values of a strided one's cotangent are no work."""
    x, kernel = array(1, 8, 8, 3), array(3, 3, 3, 4)
    forward = functools.partial(convolution, window_strides=strides, padding="SAME")

    def gradient(kernel, cotangent):
        return jax.linear_transpose(lambda x: forward(x, kernel), x)(cotangent)

    assert flops(gradient, kernel, jax.eval_shape(forward, x, kernel)) == flops(forward, x, kernel)


def test_padding_is_counted_as_if_it_were_values():
    x, kernel = array(1, 8, 8, 3), array(3, 3, 3, 4)
    function = functools.partial(convolution, window_strides=(1, 1), padding="SAME")
    assert flops(function, x, kernel) == 2 * (8 * 8 * 4) * (3 * 3 * 3)
    assert xla_flops(function, x, kernel) < flops(function, x, kernel)


def test_a_product_agrees_with_xla():
    assert flops(product, X, W) == xla_flops(product, X, W) == PRODUCT


def test_only_products_and_convolutions_count():
    assert flops(lambda x: jax.nn.softmax(jnp.exp(x) * 3 + x.mean()), X) == 0
    assert flops_by_module(lambda x: x, X) == {}


def test_a_scan_counts_as_often_as_it_runs():
    def scanned(x, w, ws):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, ws)
        return x @ w

    assert flops(scanned, X, W, array(7, 6, 6)) == 8 * PRODUCT
    assert flops(jax.vmap(scanned, (0, None, None)), array(3, 5, 6), W, array(7, 6, 6)) == 3 * 8 * PRODUCT

    def twice(x, ws):
        return jax.lax.scan(lambda x, _: (scanned(x, ws[0], ws), None), x, None, length=4)[0]

    assert flops(twice, X, array(7, 6, 6)) == 4 * 8 * PRODUCT


def test_a_loop_of_known_length_is_a_scan_and_one_of_unknown_counts_once():
    assert flops(lambda x, w: jax.lax.fori_loop(0, 9, lambda _, x: x @ w, x), X, W) == 9 * PRODUCT
    assert flops(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x), X, W, jnp.int32(9)) == PRODUCT
    assert flops(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 5, lambda x: x @ w, x), X, W) == PRODUCT


def test_of_a_choice_the_dearest_counts():
    branches = [lambda x, w: x, lambda x, w: x @ w @ w @ w, lambda x, w: x @ w]
    assert flops(lambda i, x, w: jax.lax.switch(i, branches, x, w), jnp.int32(0), X, W) == 3 * PRODUCT
    assert flops(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), X, W) == PRODUCT

    def often(i, x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.switch(i, branches, x, w), None), x, None, length=5)[0]

    assert flops(often, jnp.int32(0), X, W) == 15 * PRODUCT


@jax.custom_vjp
def own(x, w):
    return x @ w


own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


@jax.custom_jvp
def forward_rule(x, w):
    return x @ w


forward_rule.defjvp(lambda values, tangents: (product(*values), product(tangents[0], values[1])))


@pytest.mark.parametrize(
    "nested", [jax.jit(product), jax.checkpoint(product), own, forward_rule, jax.jit(jax.jit(jax.checkpoint(own)))]
)
def test_what_is_nested_counts_as_it_would_alone(nested):
    assert flops(nested, X, W) == PRODUCT
    assert flops(jax.vmap(nested, (0, None)), array(3, 5, 6), W) == 3 * PRODUCT


def chain(ws, x):
    for w in ws:
        x = x @ w
    return x.sum()


def test_the_gradient_of_a_chain_costs_three_times_the_forward_pass():
    """Two products backward for one forward, but for the first layer, where its input's gradient is not asked for."""
    ws = [W] * 4
    assert flops(chain, ws, X) == 4 * PRODUCT
    assert flops(jax.grad(chain), ws, X) == 3 * 4 * PRODUCT - PRODUCT
    assert flops(jax.grad(chain, argnums=(0, 1)), ws, X) == 3 * 4 * PRODUCT
    assert flops(jax.grad(own_chain), ws, X) == 3 * 4 * PRODUCT


def own_chain(ws, x):
    """With a rule of its own, which makes both gradients."""
    for w in ws:
        x = own(x, w)
    return x.sum()


def test_what_is_recomputed_counts_again():
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w) @ w

    plain = flops(jax.grad(lambda x, w: layer.__wrapped__(x, w).sum(), argnums=(0, 1)), X, W)
    again = flops(jax.grad(lambda x, w: layer(x, w).sum(), argnums=(0, 1)), X, W)
    assert plain == 6 * PRODUCT
    assert PRODUCT <= again - plain <= 2 * PRODUCT  # the product within the tanh at least


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(12, name="mlp_in")(x)
        return x + nn.Dense(6, name="mlp_out")(h), None


class Model(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="first")(x)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        if self.scan:
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = scanned(name="cycles")(x, None)
        else:
            for number in range(3):
                x, _ = block(name=f"cycle{number}")(x)
        return x @ x.T


MODES = ("unrolled", "scanned", "unrolled again", "scanned again")
MODELS = pytest.mark.parametrize(
    "model", [Model(), Model(scan=True), Model(remat=True), Model(scan=True, remat=True)], ids=MODES
)


@MODELS
def test_operations_belong_to_the_module_that_asks_for_them(model):
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    counts = flops_by_module(model.apply, params, X)
    layer = 3 * 2 * 5 * 6 * 12
    assert counts == {"first": PRODUCT, "cycle/mlp_in": layer, "cycle/mlp_out": layer, "other": 2 * 5 * 5 * 6}
    assert flops(model.apply, params, X) == sum(counts.values())


@MODELS
def test_so_do_their_gradients(model):
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    counts = flops_by_module(jax.grad(lambda params, x: model.apply(params, x).sum()), params, X)
    layer, least = 3 * 2 * 5 * 6 * 12, {"first": 2, "cycle/mlp_in": 3, "cycle/mlp_out": 3}
    assert set(counts) == {*least, "other"}
    assert counts["first"] == 2 * PRODUCT
    assert counts["other"] == 3 * 2 * 5 * 5 * 6
    for name in ("cycle/mlp_in", "cycle/mlp_out"):
        assert counts[name] >= 3 * layer
        assert counts[name] <= (4 if model.remat else 3) * layer


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("", "other"),
        ("/", "other"),
        ("Denoiser/patch_in", "patch_in"),
        ("Denoiser/cycle11/block0/self_attention/query", "cycle/block/self_attention/query"),
        ("/jvp(Denoiser)/cycles/while/body/block1/mlp_in", "cycle/while/body/block/mlp_in"),
        ("transpose(jvp(Denoiser))/cycle3/checkpoint/rematted_computation/mlp_in", "cycle/mlp_in"),
        ("Tokenizer/encoder/scale2/last_block0/conv_in/conv", "encoder/scale/last_block/conv_in/conv"),
        ("vmap(Model.encode)/layer7/time_in", "encode/layer/time_in"),
    ],
)
def test_names_of_modules(path, module):
    assert module_of(path) == module
