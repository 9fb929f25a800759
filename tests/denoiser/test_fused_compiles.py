"""The kernel compiles for TPUs, with gradients, at W.A.L.T-L's sizes, and all pairs of tokens stay on the chip.

No TPU is needed: `pip install -e ".[tpu]"` has the compiler. Where there is one, tests marked `tpu` run the kernel.
"""

import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from oracles import assert_near, with_all_pairs

from walt_jax.denoiser.kernels import tpu
from walt_jax.denoiser.kernels.head_norm import normalised
from walt_jax.denoiser.kernels.sharded import sharded

HEADS, FEATURES = 16, 64
# (rows, queries, keys, bias, places, segments)
SIZES = {
    "windows of 1×16×16": (20, 256, 256, True, False, False),
    "windows of 5×8×8": (16, 320, 320, True, False, False),
    "packs of windows of 5×8×8": (16, 320, 320, True, True, True),
    "whole clips": (4, 1280, 1280, False, False, True),
    "text of 16 tokens": (4, 1280, 16, False, False, True),
    "text of 64 tokens": (4, 1280, 64, False, False, True),
}


def arguments(rows, queries, keys, bias, places, segments, heads=HEADS, features=FEATURES):
    """Shapes and types of (query, key, value, bias, places, segments), tokens with all heads' features."""
    tokens = [jax.ShapeDtypeStruct((rows, n, heads * features), jnp.bfloat16) for n in (queries, keys, keys)]
    integers = [jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (queries, keys)]
    table = jax.ShapeDtypeStruct((heads, queries, keys), jnp.bfloat16)
    return *tokens, table if bias else None, integers if places else None, integers if segments else None


def gradients(query, key, value, bias, places, segments, heads=HEADS, function=tpu.fused):
    """Gradients of a weighted sum of values and sums."""

    def weighed(query, key, value, bias):
        query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
        out, logsum = function(query, key, value, bias, places, segments)
        return jnp.square(out.astype(jnp.float32)).sum() + logsum.sum()

    return jax.grad(weighed, (0, 1, 2) if bias is None else (0, 1, 2, 3))(query, key, value, bias)


def assert_as_xla(shapes, fused):
    """Gradients of a kernel on this device, and those by the matrix of all pairs."""

    def filled(shape):
        rng = np.random.default_rng(math.prod(shape.shape))
        if shape.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 3, shape.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=shape.shape), shape.dtype)

    values = jax.tree.map(filled, shapes)
    ours, theirs = (
        jax.jit(lambda *x, function=function: gradients(*x, function=function))(*values)
        for function in (fused, with_all_pairs)
    )
    assert_near(ours, theirs, 0.02)


def described(topology):
    """Devices that are not there."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it is not asked on which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes compile, none has a chip
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def temporaries(topology, *shapes):
    """Bytes that the compiled program needs besides arguments and results."""
    device = described(topology)[0]
    placed = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), x)
        for x in shapes
    ]
    program = jax.jit(gradients).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    return program.memory_analysis().temp_size_in_bytes


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("size", SIZES)
def test_no_matrix_of_all_pairs_is_in_memory(topology, size):
    rows, queries, keys, *_ = SIZES[size]
    pairs = 2 * rows * HEADS * queries * keys  # bytes, in bfloat16
    assert temporaries(topology, *arguments(*SIZES[size])) < pairs


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("features", [72, 88, 112])
def test_head_dimensions_of_larger_models_compile(features):
    assert temporaries("v5e:2x2", *arguments(4, 256, 256, True, False, False, features=features)) < 2**25


def kernels(function, topology, *shapes):
    """How many kernels a program for TPUs has, and the bytes that it needs besides arguments and results."""
    sharding = SingleDeviceSharding(described(topology)[0])
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    program = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    return program.as_text().count("tpu_custom_call"), program.memory_analysis().temp_size_in_bytes


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_windows_in_several_frames_are_not_copied_to_be_in_one_piece(topology):
    """Of W.A.L.T-L's 5 × 8 × 8: of each frame a part in one piece, the windows of 16 clips four a clip."""
    rows, frames, windows, tokens = 16, 5, 4, 64
    shape = jax.ShapeDtypeStruct((rows, frames, windows, tokens, HEADS * FEATURES), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((HEADS, frames * tokens, frames * tokens), jnp.bfloat16)
    assert tpu.holds_windows(frames, tokens)

    def weighed(query, key, value, bias):
        query, key, value = (x.reshape(*x.shape[:-1], HEADS, FEATURES) for x in (query, key, value))
        out, logsum = tpu.fused_windows(query, key, value, bias)
        return jnp.square(out.astype(jnp.float32)).sum() + logsum.sum()

    count, needed = kernels(jax.grad(weighed, (0, 1, 2, 3)), topology, shape, shape, shape, bias)
    assert count >= 2, "forward and backward"
    assert needed < 2 * rows * windows * HEADS * (frames * tokens) ** 2, "bytes of all pairs, in bfloat16"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("features", [64, 72, 128])
def test_normalisation_of_heads_compiles(topology, features):
    """With as much memory as its result and two gradients take: none for heads whose features fill 64 of 128 lanes."""
    x = jax.ShapeDtypeStruct((4096, HEADS * features), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((features,), jnp.float32)

    def weighed(x, scale):
        return jnp.square(normalised(x, scale).astype(jnp.float32)).sum()

    count, needed = kernels(jax.grad(weighed, (0, 1)), topology, x, scale)
    assert count >= 2, "forward and backward"
    assert needed < 4 * 2 * 4096 * HEADS * features


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("divided", [(), ("data", "fsdp")])
@pytest.mark.parametrize("sizes", [(2, 1, 2, 1), (2, 2, 1, 1)])
def test_compiles_on_a_mesh(sizes, divided):
    """Also within a `jax.shard_map` that divides rows, as that of packs, whatever axes have one device."""
    devices = described("v5e:2x2")
    mesh = Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "tensor", "context"))
    rows = PartitionSpec(("data", "fsdp"))
    shapes = arguments(8, 256, 256, False, False, True)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows)), shapes)

    def function(query, key, value, bias, places, segments):
        if not divided:
            return sharded(query, key, value, bias, places, segments)
        return jax.shard_map(
            lambda *x: sharded(*x[:3], None, None, x[3:]),
            in_specs=rows,
            out_specs=rows,
            axis_names=set(divided),
            check_vma=False,
        )(query, key, value, *segments)

    with jax.set_mesh(mesh):
        step = jax.jit(lambda *x: gradients(*x, function=function))
        text = step.trace(*placed).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.tpu
@pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")
@pytest.mark.parametrize("size", SIZES)
def test_on_a_tpu_the_kernel_gives_what_xla_gives(size):
    assert_as_xla(arguments(*SIZES[size]), tpu.fused)
