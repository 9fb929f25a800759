"""Muon gets the hidden matrices and nothing else, and both optimizers take the steps that their papers write down."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.denoiser.layout import Layout
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.training.muon import scale_by_muon
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer, muon_kinds


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def denoiser(heads, scan):
    config = WaltConfig(16 * heads, heads, 4, ((1, None, None), (None, 4, 4)), adaln_rank=16, scan=scan)
    condition = Condition(text=shape(1, 1, 3, 32), text_mask=shape(1, 1, 3, dtype=bool))
    inputs = shape(1, 1280, 8), shape(1, 1), condition, Layout(grid=(5, 16, 16))
    return jax.eval_shape(Denoiser(config, (5, 16, 16)).init, jax.random.key(0), *inputs)["params"]


def text(heads):
    encoder = T5Encoder(T5Config(32, 1, heads, 16, 64), vocab_size=100)
    return jax.eval_shape(encoder.init, jax.random.key(0), shape(1, 3, dtype=int), shape(1, 3, dtype=bool))["params"]


def tokenizer():
    config = TokenizerConfig(8, 32, (1, 2), ((2, 2, 2),), 1, 8, 2)
    return jax.eval_shape(Tokenizer(config).init, jax.random.key(0), shape(1, 3, 8, 8, 3))["params"]


def names(tree):
    """Paths like "cycles/block0/mlp_in/kernel" to leaves; a leaf is what stands for one parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def of_muon(boxed):
    return {name for name, kind in names(muon_kinds(boxed)).items() if kind != "adam"}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("heads", [2, 16])
def test_muon_takes_the_denoisers_hidden_matrices(heads, scan):
    """Not the patches in and out, positions, the relative bias (it is looked up), AdaLN-LoRA, norms, biases."""
    blocks = [
        f"{cycle}/block{block}/{layer}/kernel"
        for cycle in (["cycles"] if scan else ["cycle0", "cycle1"])
        for block in (0, 1)
        for layer in (
            *(
                f"{attention}_attention/{name}"
                for attention in ("self", "cross")
                for name in ("query", "key", "value", "out")
            ),
            "mlp_in",
            "mlp_out",
        )
    ]
    whole = [f"{name}/kernel" for name in ("text_in", "text_pooled", "time_in", "time_out", "adaln", "adaln_out")]
    assert of_muon(denoiser(heads, scan)) == {*blocks, *whole}


@pytest.mark.parametrize("heads", [2, 16])
def test_muon_takes_the_text_encoders_hidden_matrices(heads):
    layers = ("query_0", "key_0", "value_0", "attention_out_0", "mlp_gate_0", "mlp_in_0", "mlp_out_0")
    assert of_muon(text(heads)) == {f"{name}/kernel" for name in layers}


def test_muon_takes_the_tokenizers_convolutions_between_wide_layers():
    taken, every = of_muon(tokenizer()), names(tokenizer())
    narrow = {"encoder/conv_in/kernel", "encoder/conv_out/kernel", "decoder/conv_in/kernel", "decoder/conv_out/kernel"}
    assert taken == {name for name in every if name.endswith("kernel") and "affine" not in name} - narrow
    assert len(taken) == 15


def test_a_scans_kernels_are_a_matrix_each():
    kinds = names(muon_kinds({"a": denoiser(2, scan=True), "b": tokenizer(), "c": denoiser(2, scan=False)}))
    assert kinds["a/cycles/block0/mlp_in/kernel"] == "stack"
    assert kinds["a/adaln/kernel"] == kinds["c/cycle1/block0/mlp_in/kernel"] == "matrix"
    convolution = next(value for name, value in kinds.items() if re.search("encoder/scale0_block0/conv_in", name))
    assert convolution == "matrix"


def learning_rate(config, peak, steps, step):
    """Linear from 0 to the peak in `warmup_steps`, then a half cosine to the fraction of it at `steps`."""
    warmup = min(config.warmup_steps, steps - 1)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def updates_of(optimizer, params, gradients):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield updates, params


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_learning_rate_warms_up_and_decays(steps, warmup, final):
    """Adam's update of a gradient that never changes is the learning rate."""
    config = OptimizerConfig("adamw", 0.5, warmup_steps=warmup, final_fraction=final)
    params = {"w": jnp.ones(3)}
    seen = [
        -float(updates["w"][0])
        for updates, _ in updates_of(make_optimizer(config, steps, params), params, [{"w": 0.1 * jnp.ones(3)}] * steps)
    ]
    expected = [learning_rate(config, 0.5, steps, step) for step in range(steps)]
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-6)


def test_the_ends_of_the_schedule():
    config = OptimizerConfig("adamw", 0.5, warmup_steps=2, final_fraction=0.1)
    assert [round(learning_rate(config, 0.5, 10, step), 6) for step in (0, 1, 2, 10)] == [0, 0.25, 0.5, 0.05]
    one = OptimizerConfig("adamw", 0.5, warmup_steps=100)
    assert learning_rate(one, 0.5, 1, 0) == 0.5  # a stage of one step trains all the same


@pytest.mark.parametrize("clip_after", [0, 1])
def test_adamw_by_hand(clip_after):
    """With the gradient's global norm clipped, maybe late, bias-corrected moments and decoupled decay."""
    config = OptimizerConfig("adamw", 0.1, b1=0.8, b2=0.95, weight_decay=0.3, clip_norm=0.7, clip_after=clip_after)
    params = {"a": normal(0, 3), "b": normal(1, 2, 2)}
    gradients = [{"a": s * normal(10 * i, 3), "b": s * normal(10 * i + 1, 2, 2)} for i, s in enumerate((9.0, 0.1, 1.0))]
    w = np.concatenate([params["a"], params["b"].ravel()]).astype(np.float64)
    m, v = np.zeros(7), np.zeros(7)
    ours = updates_of(make_optimizer(config, 3, params), jax.tree.map(jnp.asarray, params), gradients)
    for step, (gradient, (_, after)) in enumerate(zip(gradients, ours, strict=True)):
        g = np.concatenate([gradient["a"], gradient["b"].ravel()]).astype(np.float64)
        g *= min(1, 0.7 / np.linalg.norm(g)) if step >= clip_after else 1
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        direction = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        w = w - learning_rate(config, 0.1, 3, step) * (direction + 0.3 * w)
        np.testing.assert_allclose(np.concatenate([after["a"], after["b"].ravel()]), w, rtol=1e-4, atol=1e-6)


def newton_schulz(g):
    """Five steps of Jordan's quintic towards U Vᵀ, and the scale that he gives to tall matrices."""
    x = g.astype(np.float64) / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x * math.sqrt(max(1, g.shape[1] / g.shape[0]))


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adam():
    shapes = {
        "matrix": ((20, 16), ("embed", "mlp")),
        "stack": ((2, 16, 24), ("layers", "embed", "mlp")),
        "convolution": ((2, 1, 3, 16, 17), (None, None, None, "channels_in", "channels_out")),
        "embedding": ((30, 20), ("vocab", "embed")),
        "bias": ((20,), ("embed",)),
    }
    boxed = {
        name: nn.LogicallyPartitioned(jnp.asarray(normal(0, *size)), axes) for name, (size, axes) in shapes.items()
    }
    params = nn.meta.unbox(boxed)
    gradient = {name: 5 * normal(i, *leaf.shape) for i, (name, leaf) in enumerate(params.items())}
    config = OptimizerConfig("muon", 0.01, 0.3, warmup_steps=2, final_fraction=0.1, weight_decay=0.2)
    optimizer, before = make_optimizer(config, 5, boxed), params
    for step, (updates, after) in enumerate(updates_of(optimizer, params, [gradient] * 5)):
        adam, muon = (learning_rate(config, peak, 5, step) for peak in (0.01, 0.3))
        # Optax's Adam beside Muon looks ahead, as Nesterov's momentum does (Dozat 2016).
        adam *= 0.9 * (1 - 0.9 ** (step + 1)) / (1 - 0.9 ** (step + 2)) + 0.1 / (1 - 0.9 ** (step + 1))
        for name in ("embedding", "bias"):
            decay = learning_rate(config, 0.01, 5, step) * 0.2 * before[name]
            np.testing.assert_allclose(updates[name] + decay, -adam * np.sign(gradient[name]), rtol=1e-3, atol=1e-7)
        expected = {
            "matrix": newton_schulz(gradient["matrix"]),
            "stack": np.stack([newton_schulz(g) for g in gradient["stack"]]),
            "convolution": newton_schulz(gradient["convolution"].reshape(-1, 17)).reshape(2, 1, 3, 16, 17),
        }
        for name, direction in expected.items():
            decay = muon * 0.2 * before[name]
            np.testing.assert_allclose(updates[name] + decay, -muon * direction, rtol=1e-2, atol=1e-4)
        before = after


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 60), (90, 17), (2, 3, 16, 20)])
def test_muon_does_what_optaxs_does(sizes, stacked):
    """Which iterates with the matrix itself; some singular values are next to 0."""
    shape = (3, *sizes) if stacked else sizes
    gradients = [{"x": jnp.asarray(normal(seed, *shape))} for seed in range(4)]
    gradients[2] = {"x": gradients[2]["x"].at[..., :8].multiply(1e-4)}
    axes = optax.contrib.MuonDimensionNumbers(tuple(range(int(stacked), len(shape) - 1)), (len(shape) - 1,))
    theirs = optax.chain(optax.contrib.muon(1.0, muon_weight_dimension_numbers={"x": axes}), optax.scale(-1.0))
    ours = scale_by_muon(stacked)
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, their_state = ours.init(params), theirs.init(params)
    for gradient in gradients:
        update, state = ours.update(gradient, state)
        expected, their_state = theirs.update(gradient, their_state, params)
        np.testing.assert_allclose(update["x"], expected["x"], rtol=1e-4, atol=2e-5)


def boxed_stack(*arrays):
    """Layers of a scan, stacked."""
    return nn.LogicallyPartitioned(jnp.stack(arrays), ("layers", "embed", "mlp"))


def test_adafactor_by_hand():
    """A factored matrix and a vector, with β₂ = 1 - step^-0.8, clipping, and decay times the learning rate."""
    config = OptimizerConfig("adafactor", 0.1, weight_decay=0.3)
    params = {"matrix": normal(0, 130, 140), "vector": normal(1, 5)}
    gradients = [{"matrix": s * normal(i, 130, 140), "vector": s * normal(i, 5)} for i, s in enumerate((1.0, 3.0, 0.2))]
    matrix, vector = (params[name].astype(np.float64) for name in ("matrix", "vector"))
    rows, columns, v = np.zeros(130), np.zeros(140), np.zeros(5)
    ours = updates_of(make_optimizer(config, 3, params), jax.tree.map(jnp.asarray, params), gradients)
    for step, (gradient, (_, after)) in enumerate(zip(gradients, ours, strict=True)):
        keep, rate = 1 - (step + 1) ** -0.8, learning_rate(config, 0.1, 3, step)
        squares = gradient["matrix"].astype(np.float64) ** 2
        rows = keep * rows + (1 - keep) * squares.mean(1)
        columns = keep * columns + (1 - keep) * squares.mean(0)
        v = keep * v + (1 - keep) * gradient["vector"].astype(np.float64) ** 2
        updates = gradient["matrix"] / np.sqrt(np.outer(rows, columns) / rows.mean()), gradient["vector"] / np.sqrt(v)
        clipped = [update / max(1, np.sqrt((update**2).mean())) for update in updates]
        matrix, vector = (w - rate * (u + 0.3 * w) for w, u in zip((matrix, vector), clipped, strict=True))
        np.testing.assert_allclose(after["matrix"], matrix, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(after["vector"], vector, rtol=1e-3, atol=1e-5)


def test_adafactor_updates_a_scans_layers_as_if_they_were_not_stacked():
    layers = [normal(i, 16, 24) for i in range(2)]
    slopes = [[s * normal(10 * i + j, 16, 24) for j, s in enumerate((1.0, 50.0))] for i in range(3)]
    config = OptimizerConfig("adafactor", 0.1)
    stacked = {"w": boxed_stack(*layers)}
    ours = updates_of(
        make_optimizer(config, 3, stacked), nn.meta.unbox(stacked), [{"w": np.stack(slope)} for slope in slopes]
    )
    each = {"a": layers[0], "b": layers[1]}
    alone = updates_of(make_optimizer(config, 3, each), each, [dict(zip("ab", slope, strict=True)) for slope in slopes])
    for (_, mine), (_, other) in zip(ours, alone, strict=True):
        np.testing.assert_allclose(mine["w"], np.stack([other["a"], other["b"]]), rtol=1e-6)
