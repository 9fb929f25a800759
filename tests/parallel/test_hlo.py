"""Programs are read as compilers print them: trip counts, products, bytes of memory, collectives each once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.parallel.cost import flops
from walt_jax.parallel.hlo import Program, _valid, groups

LOOP = """
HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[1,2,8]) -> bf16[1,8,8] {
  %p = bf16[1,2,8]{2,1,0} parameter(0)
  %gather.1 = bf16[1,8,8]{2,1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %begun = bf16[1,8,8]{2,1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%more (q: bf16[1,2,8], x: bf16[16,8]) -> bf16[16,8] {
  %q = bf16[1,2,8]{2,1,0} parameter(0)
  %x = bf16[16,8]{1,0} parameter(1)
  %gather.2 = bf16[1,8,8]{2,1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %y = bf16[16,8]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf, metadata={op_name="jit(f)/mlp/dot_general"}
}

%scattered (g: f32[8,8]) -> f32[2,8] {
  %g = f32[8,8]{1,0} parameter(0)
  %reduced = f32[8,8]{1,0} all-reduce(%g), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2,8]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={2,8}
}

%updated (stack: f32[24,64], one: f32[1,64], at: s32[]) -> f32[24,64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %one = f32[1,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %set = f32[24,64]{1,0} dynamic-update-slice(%stack, %one, %at, %nought)
}

%sliced (stack: f32[24,64], at: s32[]) -> f32[1,64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %nought = s32[] constant(0)
  ROOT %get = f32[1,64]{1,0} dynamic-slice(%stack, %at, %nought), dynamic_slice_sizes={1,64}
}

%body (s: (s32[], bf16[1,2,8], bf16[16,8], f32[24,64], f32[8,8])) -> (s32[]) {
  %s = (s32[], bf16[1,2,8]{2,1,0}, bf16[16,8]{1,0}, f32[24,64]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[1,2,8]{2,1,0} get-tuple-element(%s), index=1
  %z = bf16[16,8]{1,0} get-tuple-element(%s), index=2
  %k = f32[24,64]{1,0} get-tuple-element(%s), index=3
  %grad = f32[8,8]{1,0} get-tuple-element(%s), index=4
  %fusion.1 = bf16[1,8,8]{2,1,0} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,8]{1,0} fusion(%w, %z), kind=kOutput, calls=%more, backend_config={"estimated_cycles":"77"}
  %fusion.3 = f32[1,64]{1,0} fusion(%k, %i), kind=kLoop, calls=%sliced
  %fusion.4 = f32[24,64]{1,0} fusion(%k, %fusion.3, %i), kind=kLoop, calls=%updated
  %fusion.5 = f32[2,8]{1,0} fusion(%grad), kind=kCustom, calls=%scattered.all-reduce-scatter
  ROOT %t = (s32[]) tuple(%i)
}

%condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(24)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: f32[4,8], y: f32[8,16]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)S(1)} parameter(1)
  %dot = f32[4,16]{1,0:T(8,128)} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %init = (s32[]) tuple()
  %loop = (s32[]) while(%init), condition=%condition, body=%body
  %all = f32[4,16]{1,0:T(8,128)} all-reduce(%dot), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %out = f32[4,16]{1,0:T(8,128)} copy(%all)
}
""".replace("%scattered (", "%scattered.all-reduce-scatter (")


@pytest.fixture(scope="module")
def operations():
    return Program(LOOP).operations()


def test_a_loop_runs_as_often_as_its_condition_says(operations):
    assert {operation.times for operation in operations if operation.computation == "body"} == {24}
    assert {operation.times for operation in operations if operation.computation == "main"} == {1}


def test_the_compilers_note_of_a_trip_count_comes_first():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {o.times for o in Program(noted).operations() if o.computation == "body"} == {5}


def test_products(operations):
    dot, convolution = ([p for o in operations for p in o.products if o.computation == c] for c in ("main", "body"))
    assert [(p.flops, p.sides) for p in dot] == [(2 * 4 * 8 * 16, (4, 16, 8))]
    assert [p.flops for p in convolution] == [2 * 16 * 8 * 16]


def test_collectives_count_once_and_say_their_kind_size_and_group(operations):
    """One that runs while others do is printed in each of them."""
    found = {o.kind: o for o in operations if o.kind}
    assert [o.kind for o in operations if o.kind] == ["all-gather", "reduce-scatter", "all-reduce"]
    gather = found["all-gather"]
    assert (gather.bytes, gather.overlaps, gather.groups.tolist()) == (128, True, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert (found["reduce-scatter"].bytes, found["reduce-scatter"].overlaps) == (256, False)
    assert found["all-reduce"].groups is None
    assert found["all-reduce"].bytes == 8 * 128 * 4  # tiles are padded


def test_what_a_sparse_core_does_runs_while_others_do():
    """It counts in the loop that starts it."""
    began = """  %fusion.5 = ((f32[8,8], token[]), f32[8,8]{1,0}) call-start(%grad), to_apply=%sc
  %ended = f32[8,8]{1,0} call-done(%fusion.5)"""
    called = """
%sc (g: f32[8,8]) -> f32[8,8] {
  %g = f32[8,8]{1,0} parameter(0)
  ROOT %reduced = f32[8,8]{1,0} all-reduce(%g), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body ("""
    line = next(line for line in LOOP.splitlines() if "%fusion.5" in line)
    found = [o for o in Program(LOOP.replace(line, began).replace("\n%body (", called)).operations() if o.kind]
    assert [(o.kind, o.overlaps, o.computation, o.times) for o in found if o.bytes == 256] == [
        ("all-reduce", True, "body", 24)
    ]


def test_only_what_a_slice_reads_and_an_update_writes_moves(operations):
    """A stack of 24 in HBM is not read for one of its rows."""
    slices = [o.hbm_bytes for o in operations if o.computation == "body" and not o.products and not o.kind]
    row = 64 * 4
    assert slices == [row + row + 4, row + row + 4]  # the row twice, and its number


def test_what_is_on_the_chip_does_not_move(operations):
    dot = next(o for o in operations if o.products and o.computation == "main")
    assert dot.hbm_bytes == 4 * 8 * 4 + 8 * 128 * 4  # of the operands one, and the padded result


def test_a_kernels_operations_are_those_that_it_states():
    stated = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"123","bytes":"4"}}'
    kernel = LOOP.replace(
        "ROOT %out = f32[4,16]{1,0:T(8,128)} copy(%all)", f"ROOT %out = f32[4,16]{{1,0}} custom-call(%all), {stated}"
    )
    assert [o.flops for o in Program(kernel).operations()][-1] == 123


def test_cycles_are_the_compilers(operations):
    assert [o.cycles for o in operations if o.cycles] == [77]


def dilated_places(out, kernel, size, stride, low, dilate):
    """Pairs that meet a value, one by one in an array that is dilated and padded."""
    spread = np.zeros((size - 1) * dilate + 1)
    spread[::dilate] = 1
    padded = np.concatenate([np.zeros(low), spread, np.zeros(100)])
    return int(sum(padded[o * stride + k] for o in range(out) for k in range(kernel)))


@pytest.mark.parametrize(
    ("out", "kernel", "size", "stride", "low", "dilate"),
    [(8, 3, 8, 1, 1, 1), (4, 3, 8, 2, 0, 1), (8, 3, 4, 1, 1, 2), (16, 16, 16, 15, 0, 16)],
)
def test_a_convolutions_padding_and_dilation_cost_nothing(out, kernel, size, stride, low, dilate):
    expected = dilated_places(out, kernel, size, stride, low, dilate)
    assert _valid(out, kernel, size, stride, low, dilate, 1) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
    ],
)
def test_groups(text, expected):
    assert groups(text).tolist() == expected


def test_pairs_of_a_permutation_are_its_groups():
    assert groups("source_target_pairs={{0,1},{1,0}}, x").tolist() == [[0, 1], [1, 0]]


def test_a_compiled_scans_products_are_those_of_its_trace():
    """And of a fusion's body, on this machine's compiler, which notes trip counts."""

    def loss(w, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.square(y).sum()

    w, x = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    step = jax.grad(loss)
    text = jax.jit(step).lower(w, x).compile().as_text()
    if "custom_call_target" in text and not re.search(r"\bdot\(", text):
        pytest.skip("this compiler calls a library for its products")
    assert sum(o.flops for o in Program(text).operations()) == flops(step, w, x)
