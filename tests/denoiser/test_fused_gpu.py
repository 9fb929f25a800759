"""The kernel for GPUs equals `attend`, with gradients; no GPU is needed to interpret it, to lower or to compile it.

Where there is a GPU, tests marked `gpu` run it.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from oracles import assert_near, assert_nothing_seen_is_zero
from test_fused import CLOSE, Case, with_gradients
from test_fused_compiles import SIZES, arguments, assert_as_xla, gradients

from walt_jax.denoiser.kernels import gpu
from walt_jax.denoiser.kernels.sharded import holds
from walt_jax.layers import compiling_for
from walt_jax.parallel.topology import topology

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 16 queries and keys, the fewest; rows are divided among two programs or one."""
    monkeypatch.setattr(gpu, "_blocks", lambda *_: (16, 16))
    monkeypatch.setattr(gpu, "PROGRAMS", 8)


def interpreted(arguments, places, segments):
    return gpu.fused(*arguments, places, segments, interpret=True)


def both(case, arguments=None):
    """Values, sums and gradients, of the kernel and of the obvious way."""
    given, *rest = case.arguments(0)
    ours = jax.jit(functools.partial(with_gradients, interpreted))(given if arguments is None else arguments, *rest)
    return ours, jax.jit(functools.partial(with_gradients, case.plainly))(given, *rest)


CASES = {
    "no bias, keys that fill no block": Case(1, 40, 33, 2, 8, segments=True),
    "bias of all rows": Case(2, 33, 20, 1, 24, "shared"),
    "bias by places": Case(2, 33, 40, 1, 8, "placed", segments=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_attention_with_a_matrix_of_all_pairs(case, small_blocks):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **CLOSE), *both(case))


def test_numbers_of_16_bits(small_blocks):
    """Against float32: rounding of inputs, of weights and of results, each of 8 bits. Sums stay in float32."""
    case = Case(2, 24, 40, 1, 16, "placed")
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.arguments(0)[0])
    ours, theirs = both(case, rounded)
    assert ours[0][0].dtype == jnp.bfloat16 and ours[0][1].dtype == jnp.float32
    assert_near(ours, theirs, 0.01)


def test_a_query_that_sees_nothing_has_zeros_and_no_gradient():
    assert_nothing_seen_is_zero(gpu.fused)


def test_what_the_kernel_does_not_hold_is_left_to_xla():
    assert not holds(16, 64, 320, jnp.bfloat16)  # this is a CPU
    with compiling_for("cuda"):
        assert holds(16, 64, 0, jnp.bfloat16) and holds(16, 120, 2048, jnp.bfloat16)
        assert not holds(16, 256, 0, jnp.bfloat16) and not holds(16, 64, 4096, jnp.bfloat16)


def lowered(size, features=64, dtype=jnp.bfloat16, device=None):
    """The program with gradients for CUDA, not compiled."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype if x.dtype == jnp.int32 else dtype, sharding=device),
        arguments(*SIZES[size], features=features),
    )
    program = jax.jit(functools.partial(gradients, function=gpu.fused))
    return program.trace(*shapes).lower(lowering_platforms=("cuda",))


LOWERED = ["windows of 5×8×8", "packs of windows of 5×8×8", "whole clips", "text of 16 tokens"]


@pytest.mark.parametrize("features", [64, 72])
@pytest.mark.parametrize("size", LOWERED)
def test_lowers_for_cuda_without_a_matrix_of_all_pairs(size, features):
    rows, queries, keys, bias, *_ = SIZES[size]
    text = lowered(size, features).as_text()
    assert text.count("__gpu$xla.gpu.triton") == (4 if bias else 3)
    shapes = [tuple(map(int, re.findall(r"\d+", dims))) for dims in re.findall(r"tensor<((?:\d+x)+)\w", text)]
    pairs, largest = rows * 16 * queries * keys, max(map(math.prod, shapes))
    assert largest < pairs or largest == rows * queries * 16 * features  # text is shorter than a head has features


@pytest.mark.slow
@pytest.mark.skipif(not topology("h100:1").compiles, reason="JAX's plugin for CUDA is not installed")
@pytest.mark.parametrize(("features", "dtype"), [(64, jnp.bfloat16), (120, jnp.bfloat16), (128, jnp.float32)])
@pytest.mark.parametrize("size", LOWERED[:3])
def test_compiles_for_a_gpu_that_is_not_there(size, features, dtype):
    """By XLA, whose target has an H100's shared memory; all pairs are not among the temporaries."""
    device = SingleDeviceSharding(topology("h100:1").devices()[0])
    rows, queries, keys, *_ = SIZES[size]
    pairs = rows * 16 * queries * keys * jnp.dtype(dtype).itemsize
    assert lowered(size, features, dtype, device).compile().memory_analysis().temp_size_in_bytes < pairs


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("features", [64, 72, 120])
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_the_kernel_gives_what_xla_gives(size, features):
    assert_as_xla(arguments(*SIZES[size], features=features), gpu.fused)
