"""T5's encoder equals its equations in numpy, and padding has no part in it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.text.t5 import T5Config, T5Encoder, relative_buckets

CONFIG = T5Config(dim=6, layers=2, heads=2, head_dim=4, mlp_dim=5)
ENCODER = T5Encoder(CONFIG, vocab_size=11)
IDS = np.array([[3, 7, 2, 1, 0, 0], [9, 1, 0, 0, 0, 0], [4, 4, 5, 6, 10, 1]], np.int32)
MASK = IDS != 0


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    shapes = nn.meta.unbox(jax.eval_shape(ENCODER.init, jax.random.key(0), IDS, MASK))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([jnp.asarray(0.5 * normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def encode(params):
    return jax.jit(functools.partial(ENCODER.apply, {"params": params}))


def bucket(distance):
    """The published rule (bidirectional, 32 buckets, distances up to 128), for one key that is `distance` behind.

    Half of the buckets are for keys in front. Of those 16, distances 0 to 7 have one each; the others are
    8 + ⌊8 · log(n / 8) / log(128 / 8)⌋ = 8 + ⌊log₂(n² / 64)⌋, at most 15, which whole numbers give exactly.
    """
    n, half = abs(distance), 16 if distance > 0 else 0
    if n < 8:
        return half + n
    return half + min(15, 8 + (n * n // 64).bit_length() - 1)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40))
def test_relative_buckets(length):
    expected = [[bucket(key - query) for key in range(length)] for query in range(length)]
    np.testing.assert_array_equal(relative_buckets(length), expected)


def test_far_buckets():
    table = relative_buckets(300)
    assert table[0].tolist() == [bucket(key) for key in range(300)]
    assert table[:, 0].tolist() == [bucket(-query) for query in range(300)]
    assert (table[299, 0], table[0, 299]) == (15, 31)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def twin(params, ids):
    """One caption without padding: T5 v1.1 token by token and head by head, in double precision."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = [params["embedding"][i] for i in ids]
    for layer in range(CONFIG.layers):
        p = {name.removesuffix(f"_{layer}"): value for name, value in params.items() if name.endswith(f"_{layer}")}
        normed = [rms_norm(token, p["attention_norm"]["scale"]) for token in x]
        attended = []
        for position, token in enumerate(normed):
            parts = []
            for head in range(CONFIG.heads):
                of_head = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
                query = token @ p["query"]["kernel"][:, of_head]
                keys = [other @ p["key"]["kernel"][:, of_head] for other in normed]
                values = [other @ p["value"]["kernel"][:, of_head] for other in normed]
                # Not divided by √d; the bias is that of the first layer in all of them.
                logits = [
                    query @ key + params["relative_bias"][bucket(place - position), head]
                    for place, key in enumerate(keys)
                ]
                weights = np.exp(logits) / np.exp(logits).sum()
                parts.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            attended.append(np.concatenate(parts) @ p["attention_out"]["kernel"])
        x = [token + update for token, update in zip(x, attended, strict=True)]
        for position, token in enumerate(x):
            h = rms_norm(token, p["mlp_norm"]["scale"])
            gated = gelu(h @ p["mlp_gate"]["kernel"]) * (h @ p["mlp_in"]["kernel"])
            x[position] = token + gated @ p["mlp_out"]["kernel"]
    return np.stack([rms_norm(token, params["norm_out"]["scale"]) for token in x])


def test_equals_its_equations(encode, params):
    embeddings = np.asarray(encode(IDS, MASK))
    assert embeddings.shape == (3, 6, CONFIG.dim)
    for row, ids, mask in zip(embeddings, IDS, MASK, strict=True):
        np.testing.assert_allclose(row[mask], twin(params, ids[mask]), rtol=1e-4, atol=1e-5)


def test_padding_has_no_effect(encode):
    embeddings = np.asarray(encode(IDS, MASK))
    other = np.where(MASK, IDS, 8)
    np.testing.assert_array_equal(np.asarray(encode(other, MASK))[MASK], embeddings[MASK])
    longer, mask = (np.pad(x, ((0, 0), (0, 4))) for x in (IDS, MASK))
    np.testing.assert_allclose(np.asarray(encode(longer, mask))[mask], embeddings[MASK], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encode(IDS[:1], MASK[:1])[0], embeddings[0], rtol=1e-4, atol=1e-5)


def test_every_token_sees_every_other(encode):
    changed = IDS.copy()
    changed[2, 4] = 2
    moved = np.asarray(encode(changed, MASK)) != np.asarray(encode(IDS, MASK))
    assert moved.any(-1).tolist() == [[False] * 6, [False] * 6, [True] * 6]


def test_the_initialisation_keeps_logits_small_without_a_division():
    """T5 draws queries with variance 1 / (d · d_head), so that logits of normed inputs have a variance near 1."""
    config = T5Config(dim=64, layers=1, heads=2, head_dim=32, mlp_dim=64)
    params = nn.meta.unbox(T5Encoder(config, 16).init(jax.random.key(0), IDS, MASK))["params"]
    x = normal(0, 200, 64)
    query, key = (jnp.asarray(x) @ params[name]["kernel"][:, :32] for name in ("query_0", "key_0"))
    assert 0.5 < float((query @ key.T).std()) < 2


def test_every_parameter_has_a_name_for_each_axis_and_the_type_is_the_configs():
    config = T5Config(dim=6, layers=1, heads=2, head_dim=4, mlp_dim=5, dtype="bfloat16")
    embeddings, boxed = jax.eval_shape(T5Encoder(config, 11).init_with_output, jax.random.key(0), IDS, MASK)
    assert embeddings.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert leaf.value.dtype == jnp.float32
