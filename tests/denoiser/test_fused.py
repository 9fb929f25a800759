"""The kernel equals `attend`: values, sums, and the gradients of both to all that has one. Interpreted, so on a CPU.

`attend` itself equals its equations, see `test_attention`.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import LARGEST, assert_near, assert_nothing_seen_is_zero, filled, normal, with_all_pairs

from walt_jax.denoiser import attend, attention, head_norm
from walt_jax.denoiser.attention import WindowAttention
from walt_jax.denoiser.kernels import MASKED, tpu
from walt_jax.denoiser.layout import Layout, PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.denoiser.windows import Window, in_windows
from walt_jax.layers import compiling_for
from walt_jax.parallel.cost import flops

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of attention, and what it is restricted by."""

    rows: int
    queries: int
    keys: int
    heads: int
    features: int
    bias: str = "none"  # "shared" by rows, or "placed": by the places of their tokens
    segments: bool = False

    def arguments(self, seed):
        """((query, key, value, bias), places, segments); the first query of the last row sees no key."""
        rng, sizes = np.random.default_rng(seed), (self.queries, self.keys)
        q, k, v = (normal(seed + i, self.rows, n, self.heads, self.features) for i, n in enumerate((*sizes, self.keys)))
        count = 21
        between = {"none": None, "shared": sizes, "placed": (count, count)}[self.bias]
        bias = between and normal(seed + 3, self.heads, *between)
        places = [rng.integers(0, count, (self.rows, n)) for n in sizes] if self.bias == "placed" else None
        segments = [rng.integers(-1, 2, (self.rows, n)) for n in sizes] if self.segments else None
        if self.segments:
            segments[0][-1, 0] = 7
        return (q, k, v, bias), places, segments

    def plainly(self, arguments, places, segments):
        return with_all_pairs(*arguments, places, segments)


def interpreted(arguments, places, segments):
    return tpu.fused(*arguments, places, segments, interpret=True)


def with_gradients(function, arguments, places, segments):
    """((values, sums), gradients), where a query sees any key."""

    def weighed(arguments):
        out, logsum = function(arguments, places, segments)
        seen = logsum > MASKED / 2
        out, logsum = jnp.where(seen[..., None], out, 0), jnp.where(seen, logsum, 0)
        return (out * normal(8, *out.shape)).sum() + (logsum * normal(9, *logsum.shape)).sum(), (out, logsum)

    gradients, both = jax.grad(weighed, has_aux=True)(arguments)
    return both, gradients


def check(case, seed=0, tolerance=CLOSE):
    ours, theirs = (
        jax.jit(functools.partial(with_gradients, function))(*case.arguments(seed))
        for function in (interpreted, case.plainly)
    )
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **tolerance), ours, theirs)


@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])  # a new program for each example
@given(
    st.builds(
        Case,
        rows=st.integers(1, 3),
        queries=st.integers(1, 40),
        keys=st.integers(1, 40),
        heads=st.integers(1, 2),
        features=st.sampled_from([8, 24, 72]),
        bias=st.sampled_from(["none", "shared", "placed"]),
        segments=st.booleans(),
    ),
    st.integers(0, 99),
)
def test_equals_attention_with_a_matrix_of_all_pairs(case, seed):
    check(case, seed)


def test_blocks_of_queries(monkeypatch):
    """Gradients of keys are summed over blocks, that of the bias over blocks and rows."""
    monkeypatch.setattr(tpu, "PAIRS", 128 * 48)
    monkeypatch.setattr(tpu, "PROGRAM_BYTES", 0)  # a row a program
    check(Case(2, 200, 40, 1, 8, "shared", segments=True))


def test_heads_that_fill_tiles_together():
    """Two programs of two heads each; and short rows that share one, their bias repeated."""
    check(Case(6, 12, 12, 4, 64, "shared", segments=True))


def test_numbers_of_16_bits():
    """Against float32: rounding of inputs, of weights and of results, each of 8 bits. Sums stay in float32."""
    case = Case(2, 24, 40, 2, 16, "placed")
    arguments, *rest = case.arguments(0)
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments)
    ours = jax.jit(functools.partial(with_gradients, interpreted))(arguments, *rest)
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments)
    theirs = jax.jit(functools.partial(with_gradients, case.plainly))(exact, *rest)
    assert ours[0][0].dtype == jnp.bfloat16 and ours[0][1].dtype == jnp.float32
    assert_near(ours, theirs, 0.01)


def test_a_query_that_sees_nothing_has_zeros_and_no_gradient():
    assert_nothing_seen_is_zero(tpu.fused)


PACK = [[(3, 2, 4), (1, 5, 6)], [(2, 3, 3), (2, 5, 3)]]
ROUTES = [(platform, *route) for platform in ("tpu", "cuda") for route in (("bias", "pack"), ("bias", "clip"))]
ROUTES.append(("tpu", "rotary", "pack"))


@pytest.mark.parametrize(("where", "relative", "kind"), ROUTES)
def test_a_layer_elsewhere_computes_what_it_does_here(where, relative, kind, monkeypatch):
    """Self-attention and text jointly, in packs and equal clips, with gradients to parameters, tokens and text."""
    window = Window(None, 2, 3)
    grid, tokens, clips = (2, 4, 6), 60, 2 if kind == "pack" else 1
    layout = Layout(grid=grid)
    if kind == "pack":
        rows = PackRows({window.name: ((18, 8, 2),)}, (30, 4))
        layout = Layout(pack=make_pack(*place_clips(PACK, tokens, clips), [window], rows))
    x, text = normal(0, 2, tokens if kind == "pack" else 48, 16), normal(1, 2, clips, 5, 16)
    mask = np.arange(5)[None, None] < np.array([[0, 5], [3, 1]])[:, :clips, None]
    layer = WindowAttention(2, (window,), (window.bounds(LARGEST),), relative, True, "none", jnp.float32)
    params = filled(layer, x, layout, text, mask)

    def computed(platform):
        def loss(params, x, text):
            with compiling_for(platform):
                y = layer.apply(params, x, layout, text, mask)
            return (jnp.where(layout.valid()[..., None], y, 0) * normal(2, *y.shape)).sum(), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, text)

    expected = computed(None)
    calls, sharded = [], attend.sharded

    def interpreted(*arguments):
        calls.append(arguments)
        return sharded(*arguments, interpret=True)

    monkeypatch.setattr(attend, "sharded", interpreted)
    monkeypatch.setattr(head_norm, "sharded_norm", functools.partial(head_norm.sharded_norm, interpret=True))
    (gradients, out), (others, other) = computed(where), expected
    assert len(calls) == 2  # windows, text
    inside = np.broadcast_to(layout.valid(), out.shape[:2])
    np.testing.assert_allclose(out[inside], other[inside], **CLOSE)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4), gradients, others)


@pytest.mark.parametrize("shape", [(2, 2, 3, 16, 2, 8), (3, 3, 2, 16, 4, 64)])
def test_windows_that_have_a_part_of_each_frame(shape):
    """As rows that the tokens of each window were moved to."""
    *_, heads, _ = shape
    tokens = shape[1] * shape[3]
    arguments = [normal(i, *shape) for i in range(3)] + [normal(3, heads, tokens, tokens)]

    def where_they_are(arguments, places, segments):
        return tpu.fused_windows(*arguments, interpret=True)

    def moved(arguments, places, segments):
        rows = [rearrange(x, "b t w n h d -> (b w) (t n) h d") for x in arguments[:3]]
        found = with_all_pairs(*rows, arguments[3], places, segments)
        sizes = dict(zip("btwn", shape[:4], strict=True))
        return tuple(rearrange(x, "(b w) (t n) ... -> b t w n ...", **sizes) for x in found)

    ours, theirs = (
        jax.jit(functools.partial(with_gradients, function))(arguments, None, None)
        for function in (where_they_are, moved)
    )
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), ours, theirs)


def test_a_model_for_tpus_moves_no_tokens_and_computes_what_it_does_here(monkeypatch):
    """W.A.L.T's pair of blocks, whose frames' tokens are in the order of the other windows' parts; with gradients."""
    windows = ((1, None, None), (None, 8, 8))
    config = WaltConfig(16, 2, 2, windows, cross_attention=False, self_conditioning=False)
    grid = 2, 8, 16
    arguments = normal(0, 1, 256, 3), normal(1, 1, 1), Condition(), Layout(grid=grid)
    params = filled(Denoiser(config, grid), *arguments)

    def computed(platform):
        def loss(params, noisy, *others):
            with compiling_for(platform):
                y = Denoiser(config, grid).apply(params, noisy, *others)
            return (y * normal(3, *y.shape)).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, *arguments)

    expected, calls = computed(None), []
    for module, name in ((attend, "sharded"), (attention, "sharded_windows")):
        function = getattr(module, name)

        def interpreted(*arguments, function=function, name=name):
            calls.append(name)
            return function(*arguments, interpret=True)

        monkeypatch.setattr(module, name, interpreted)
    monkeypatch.setattr(attention, "partition", None)
    monkeypatch.setattr(head_norm, "sharded_norm", functools.partial(head_norm.sharded_norm, interpret=True))
    found = computed("tpu")
    assert calls == ["sharded", "sharded_windows"]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4), found, expected)


def test_a_bias_that_the_chip_cannot_hold_is_left_to_xla():
    assert tpu.holds(16, 64, 1280, jnp.bfloat16) and not tpu.holds(16, 64, 2304, jnp.bfloat16)
    assert tpu.holds(16, 112, 560, jnp.bfloat16) and not tpu.holds(16, 72, 1280, jnp.bfloat16)


def test_a_kernel_counts_the_operations_of_its_equations():
    """Not those of one of its programs, of windows that share a row, or of what the backward pass computes again."""
    case = Case(2, 32, 32, 2, 64)
    both = (functools.partial(with_gradients, function) for function in (interpreted, case.plainly))
    ours, theirs = (flops(function, *case.arguments(0)) for function in both)
    assert ours == theirs == 6 * 2 * 2 * 2 * 32 * 32 * 64


def test_an_expanded_table_is_the_bias_of_all_offsets():
    bounds, sizes, heads = (3, 4, 2), (2, 4, 1), 2
    table = normal(0, 5 * 7 * 3, heads)
    places = np.indices(sizes).reshape(3, -1).T
    expected = np.moveaxis(table[attend.relative_index(places, places, bounds)], -1, 0)
    np.testing.assert_array_equal(attend.expanded(table, bounds, sizes), expected)
    order = in_windows(np.arange(8)[None], (1, 2, 1), sizes)[0]
    np.testing.assert_array_equal(attend.expanded(table, bounds, sizes, (1, 2, 1)), expected[:, order[:, None], order])


SCRIPT = pathlib.Path(__file__).with_name("fused_on_a_mesh.py")


def test_on_a_mesh_each_device_has_its_rows_and_heads(on_eight_devices):
    found = on_eight_devices(SCRIPT)
    assert all(found[name] < 1e-5 for name in ("difference", "within", "gpu", "undivided", "windows", "norm"))
    assert found["heads"].startswith("attention has 3 heads, which the mesh's tensor = 2 does not divide")
