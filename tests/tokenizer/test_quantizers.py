"""The heads: codes and latents are one to one, gradients pass straight through, penalties are what they say."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.tokenizer.autoencoder import Tokenizer, TokenizerConfig
from walt_jax.tokenizer.quantizers import (
    DEAD,
    Codebook,
    Head,
    HeadConfig,
    code_statistics,
    gaussian,
    joint_index,
    lfq_entropy,
)

LFQ = [(HeadConfig("lfq"), 4), (HeadConfig("lfq", groups=2), 6)]
FSQ = [(HeadConfig("fsq", levels=levels), len(levels)) for levels in [(3,), (2, 4), (7, 6), (8, 5, 3, 2)]]
VQ = (HeadConfig("vq", codes=11), 3)
HEADS = [*LFQ, *FSQ, VQ]
CODES = ("config", "channels")
PLACES = (2, 3, 2, 4)
names = {"ids": lambda value: f"{value.name}{value.groups}{value.levels}" if isinstance(value, HeadConfig) else ""}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(config, channels):
    """The head's variables: for "vq" a codebook at random."""
    if config.name != "vq":
        return {}
    counts = jnp.asarray(np.random.default_rng(1).uniform(1, 5, config.codes), jnp.float32)
    codebook = {"sums": normal(0, config.codes, channels) * counts[:, None], "counts": counts}
    return {"codebook": {"codebook": codebook}}


@functools.cache
def quantizer(config, channels):
    """(quantize, lookup), compiled once for all tests."""
    head, variables = Head(config, channels), filled(config, channels)
    return jax.jit(lambda z: head.apply(variables, z)), jax.jit(lambda i: head.apply(variables, i, method="lookup"))


def every_index(config, channels):
    """All of a head's codes, as a clip of one row."""
    codes = list(itertools.product(*map(range, config.group_codes(channels))))
    return jnp.array(codes)[None, None, None]


@pytest.mark.parametrize(CODES, HEADS, **names)
@pytest.mark.parametrize("scale", [0, 0.3, 3, 1e6])
def test_codes_are_in_range_and_look_up_to_exactly_the_latents(config, channels, scale):
    quantize, lookup = quantizer(config, channels)
    latents, indices, _ = quantize(scale * normal(2, *PLACES, channels))
    group_codes = config.group_codes(channels)
    assert indices.shape == (*PLACES, len(group_codes))
    assert jnp.issubdtype(indices.dtype, jnp.integer)
    assert np.all(np.asarray(indices) >= 0)
    assert np.all(np.asarray(indices) < np.array(group_codes))
    np.testing.assert_array_equal(lookup(indices), latents)


@pytest.mark.parametrize(CODES, [LFQ[1], FSQ[-1], VQ], **names)
def test_the_tokenizers_codes_look_up_to_exactly_its_latents(config, channels):
    model = Tokenizer(TokenizerConfig(channels, 4, (1, 1), ((2, 2, 2),), 1, 2, head=config))
    video = normal(3, 2, 5, 4, 4, 3)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), video))
    leaves, tree = jax.tree.flatten(shapes["params"])
    params = tree.unflatten([normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])
    variables = {"params": params}
    if config.name == "vq":
        variables["codebook"] = {"head": filled(config, channels)["codebook"]}

    @jax.jit
    def both(video):
        latents, _ = model.apply(variables, video, method="encode")
        indices, _ = model.apply(variables, video, method="tokenize")
        return latents, indices, model.apply(variables, indices, method="lookup")

    latents, indices, looked_up = both(video)
    assert indices.shape == (2, 3, 2, 2, len(config.group_codes(channels)))
    assert len(np.unique(indices)) > 2
    np.testing.assert_array_equal(looked_up, latents)


def squashing(levels):
    """fsq rounds tanh(z + shift) * half - offset."""
    half, offset = (levels - 1) / 2 + 5e-4, np.where(levels % 2 == 0, 0.5, 0.0)
    return half, offset, np.arctanh(offset / half)


def before_squashing(values, levels):
    """What fsq squashes to exactly `values`, which it then rounds to: it is no projection, 1 is not squashed to 1."""
    half, offset, shift = squashing(np.array(levels))
    return np.arctanh((np.asarray(values, np.float64) * (np.array(levels) // 2) + offset) / half) - shift


@pytest.mark.parametrize(CODES, HEADS, **names)
def test_each_code_has_latents_of_its_own_which_are_quantised_to_it(config, channels):
    quantize, lookup = quantizer(config, channels)
    indices = every_index(config, channels)
    latents = lookup(indices)
    assert len(np.unique(np.asarray(latents).reshape(-1, channels), axis=0)) == math.prod(config.group_codes(channels))
    z = jnp.asarray(before_squashing(latents, config.levels), jnp.float32) if config.name == "fsq" else latents
    np.testing.assert_array_equal(quantize(z).indices, indices)
    np.testing.assert_array_equal(quantize(z).latents, latents)


def test_bit_i_of_lfqs_index_is_on_where_channel_i_of_the_group_is_above_0():
    z = jnp.array([[0.1, -5, -0.1, 5], [-1, 1, 1, 1], [0, 0, 0, 0], [0.5, 0, 2, 2]])[None, None, None]
    one, _ = quantizer(HeadConfig("lfq"), 4)
    two, _ = quantizer(HeadConfig("lfq", groups=2), 4)
    assert one(z).indices[0, 0, 0].tolist() == [[1 + 8], [2 + 4 + 8], [0], [1 + 4 + 8]]
    assert two(z).indices[0, 0, 0].tolist() == [[1, 2], [2, 3], [0, 0], [1, 3]]
    np.testing.assert_array_equal(one(z).latents, np.where(np.asarray(z) > 0, 1, -1))


def test_vq_takes_the_nearest_code():
    config, channels = VQ
    quantize, lookup = quantizer(config, channels)
    z, codes = np.asarray(normal(5, *PLACES, channels)), np.asarray(lookup(every_index(config, channels)))[0, 0, 0]
    nearest = [int(np.square(codes - place).sum(-1).argmin()) for place in z.reshape(-1, channels)]
    assert np.asarray(quantize(z).indices).ravel().tolist() == nearest


@pytest.mark.parametrize(CODES, [*LFQ, VQ], **names)
def test_gradients_go_straight_through(config, channels):
    quantize, _ = quantizer(config, channels)
    z, cotangent = normal(6, *PLACES, channels), normal(7, *PLACES, channels)
    np.testing.assert_array_equal(jax.vjp(lambda z: quantize(z).latents, z)[1](cotangent)[0], cotangent)


@pytest.mark.parametrize(CODES, FSQ, **names)
def test_fsqs_gradients_are_those_of_the_squashing(config, channels):
    quantize, _ = quantizer(config, channels)
    z, cotangent = normal(6, *PLACES, channels), normal(7, *PLACES, channels)
    levels = np.array(config.levels)
    half, _, shift = squashing(levels)
    slope = (1 - np.tanh(np.asarray(z, np.float64) + shift) ** 2) * half / (levels // 2)
    np.testing.assert_allclose(
        jax.vjp(lambda z: quantize(z).latents, z)[1](cotangent)[0], slope * cotangent, rtol=1e-3, atol=1e-5
    )


def test_fsqs_channels_take_as_many_values_as_levels_evenly_spaced():
    levels = tuple(range(2, 11))
    quantize, _ = quantizer(HeadConfig("fsq", levels=levels), len(levels))
    z = jnp.linspace(-30, 30, 6001)[None, None, None, :, None] * jnp.ones((1, 1, 1, 1, len(levels)))
    latents = np.asarray(quantize(z).latents)[0, 0, 0]
    for channel, count in enumerate(levels):
        values = np.unique(latents[:, channel])
        assert len(values) == count
        assert np.abs(values).max() == 1
        np.testing.assert_allclose(np.diff(values), 1 / (count // 2), rtol=1e-6)
        assert np.all(np.diff(latents[:, channel]) >= 0)
        # About as many values on either side, so that an encoder that starts near 0 starts in the middle.
        assert latents[3000, channel] == 0


@pytest.mark.parametrize("levels", [1000, 2000, 4001])
def test_fsq_stays_in_range_with_many_levels(levels):
    quantize, lookup = quantizer(HeadConfig("fsq", levels=(levels, 3)), 2)
    z = jnp.array([[-30.0, 0], [30, 0]])[None, None, None]
    latents, indices, _ = quantize(z)
    assert (np.asarray(indices)[0, 0, 0, :, 0] % levels).tolist() == [0, levels - 1]
    np.testing.assert_array_equal(lookup(indices), latents)


def entropy_by_enumeration(z, groups, temperature):
    """The twin: the distribution over a group's 2^bits codes in one softmax, in double precision."""
    z = np.asarray(z, np.float64).reshape(-1, groups, z.shape[-1] // groups)
    codes = np.array(list(itertools.product((-1, 1), repeat=z.shape[-1])))
    total = 0.0
    for group in range(groups):
        logits = -np.square(z[:, group, None] - codes[None]).sum(-1) / temperature
        q = np.exp(logits - logits.max(-1, keepdims=True))
        q /= q.sum(-1, keepdims=True)
        each, average = (-(p * np.log(np.maximum(p, 1e-300))).sum(-1) for p in (q, q.mean(0)))
        total += each.mean() - average
    return total


entropy = jax.jit(lfq_entropy, static_argnums=1)
statistics = jax.jit(code_statistics, static_argnums=1)
draw_from = jax.jit(gaussian)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.floats(0.2, 8), st.floats(0.1, 3), st.integers(0, 99))
def test_the_entropy_penalty_is_that_of_all_codes_enumerated(groups, temperature, scale, seed):
    z = scale * normal(seed, 2, 1, 3, 2, 6)
    expected = entropy_by_enumeration(z, groups, temperature)
    np.testing.assert_allclose(entropy(z, groups, temperature), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_entropy_penalty_is_least_for_sure_codes_all_in_use_and_0_for_one_code(groups):
    every = jnp.array(list(itertools.product((-9.0, 9.0), repeat=4)))
    np.testing.assert_allclose(entropy(every, groups, 1.0), -4 * math.log(2), rtol=1e-5)
    np.testing.assert_allclose(entropy(jnp.tile(every[3:4], (16, 1)), groups, 1.0), 0, atol=1e-6)
    # Unsure of everything: neither term is 0, and they cancel.
    np.testing.assert_allclose(entropy(0 * every, groups, 1.0), 0, atol=1e-5)


@pytest.mark.parametrize(CODES, [*LFQ, VQ], **names)
def test_the_commitment_is_the_squared_distance_to_the_code_and_pulls_the_encoding_alone(config, channels):
    quantize, _ = quantizer(config, channels)
    z = normal(8, *PLACES, channels)
    latents = np.asarray(quantize(z).latents)
    value, slope = jax.value_and_grad(lambda z: quantize(z).penalties["commitment"])(z)
    np.testing.assert_allclose(value, np.square(z - latents).mean(), rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * (z - latents) / z.size, rtol=1e-4, atol=1e-6)


def test_fsq_and_continuous_latents_have_no_penalties():
    z = normal(0, 1, 1, 2, 2, 2)
    assert quantizer(HeadConfig("fsq", levels=(3, 4)), 2)[0](z).penalties == {}
    latents, indices, penalties = Head(HeadConfig(), 2).apply({}, z)
    assert latents is z
    assert indices is None
    assert penalties == {}


@pytest.mark.parametrize("name", ["continuous", "kl"])
def test_heads_without_codes_look_up_none(name):
    with pytest.raises(ValueError, match=f"the head '{name}' has no codes to look up"):
        Head(HeadConfig(name), 2).apply({}, jnp.zeros((1, 1, 1, 1, 1), jnp.int32), method="lookup")


def test_the_divergence_is_the_closed_formula():
    mean, log_variance = (np.asarray(normal(seed, 2, 3, 2, 2, 4), np.float64) for seed in (0, 1))
    z = jnp.asarray(np.concatenate([mean, log_variance], axis=-1), jnp.float32)
    latents, indices, penalties = quantizer(HeadConfig("kl"), 4)[0](z)
    np.testing.assert_array_equal(latents, z[..., :4])
    assert indices is None
    # KL(N(m, s²) ‖ N(0, 1)) = log(1 / s) + (s² + m²) / 2 - 1 / 2
    deviation = np.exp(log_variance / 2)
    expected = (np.log(1 / deviation) + (deviation**2 + mean**2) / 2 - 0.5).mean()
    np.testing.assert_allclose(penalties["kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(draw_from(0 * z, None).penalties["kl"], 0, atol=1e-7)


def test_in_training_kl_draws_around_the_mean_with_its_deviation():
    mean, deviation = jnp.array([3.0, -1])[None], jnp.array([0.5, 2])[None]
    z = jnp.concatenate([mean, 2 * jnp.log(deviation)], axis=-1)[None, None, None] * jnp.ones((1, 1, 1, 4000, 1))

    @jax.jit
    def draw(seed):
        return Head(HeadConfig("kl"), 2).apply({}, z, True, rngs={"latent": jax.random.key(seed)}).latents

    noise = (np.asarray(draw(0))[0, 0, 0] - np.asarray(mean)) / np.asarray(deviation)
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.07)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.07)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.07
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.all(draw(0) != draw(1))


def test_a_variance_beyond_all_bounds_is_finite():
    z = jnp.array([[0.0, 1e9], [0, -1e9]])[None, None, None]
    latents, _, penalties = draw_from(z, jnp.ones((1, 1, 1, 2, 1)))
    assert np.all(np.isfinite(latents))
    assert np.isfinite(penalties["kl"])


FEATURES, CODEBOOK = 2, 4


@jax.jit
def trained(codebook, z, seed, decay):
    """(what the codebook made of z, the codebook after the step)."""
    quantized, moved = Codebook(CODEBOOK, FEATURES, decay).apply(
        {"codebook": codebook}, z, True, rngs={"latent": jax.random.key(seed)}, mutable="codebook"
    )
    return quantized, moved["codebook"]


def encodings(seed, places=24):
    """Encodings around four corners, so that each code has some."""
    corners = jnp.array([[5.0, 5], [5, -5], [-5, 5], [-5, -5]])
    return jnp.tile(corners, (places // 4, 1)).reshape(1, 2, 3, -1, FEATURES) + normal(seed, 1, 2, 3, places // 6, 2)


def test_codes_are_moving_averages_of_the_encodings_that_chose_them():
    sums = np.array([[20.0, 16], [12, -10], [-8, 9], [-20, -30]])
    counts = np.array([4.0, 3, 2, 6])
    codebook = {"sums": jnp.asarray(sums, jnp.float32), "counts": jnp.asarray(counts, jnp.float32)}
    for step in range(4):
        z = encodings(step)
        before = sums / counts[:, None]
        quantized, codebook = trained(codebook, z, step, 0.9)
        chosen = []
        added, times = np.zeros_like(sums), np.zeros_like(counts)
        for place in np.asarray(z, np.float64).reshape(-1, FEATURES):
            chosen.append(int(np.square(before - place).sum(-1).argmin()))
            added[chosen[-1]] += place
            times[chosen[-1]] += 1
        assert set(chosen) == set(range(CODEBOOK))
        assert np.asarray(quantized.indices).ravel().tolist() == chosen
        np.testing.assert_allclose(quantized.latents, before[chosen].reshape(z.shape), rtol=1e-5)
        sums, counts = 0.9 * sums + 0.1 * added, 0.9 * counts + 0.1 * times
        np.testing.assert_allclose(codebook["sums"], sums, rtol=1e-5)
        np.testing.assert_allclose(codebook["counts"], counts, rtol=1e-5)


def test_at_the_first_step_all_codes_are_encodings():
    z = encodings(0)
    places = np.asarray(z).reshape(-1, FEATURES)
    empty = {"sums": jnp.zeros((CODEBOOK, FEATURES)), "counts": jnp.zeros(CODEBOOK)}
    # The decay of 1 leaves the codebook as the restart made it.
    quantized, after = trained(empty, z, 0, 1.0)
    codes = after["sums"] / after["counts"][:, None]
    for code in codes:
        assert np.isclose(places, code, rtol=1e-5).all(-1).any()
    np.testing.assert_allclose(after["counts"], len(places) / CODEBOOK)
    np.testing.assert_allclose(
        quantized.latents.reshape(-1, 2), codes[np.asarray(quantized.indices).ravel()], rtol=1e-6
    )


def test_only_codes_that_hardly_any_encoding_chooses_start_anew():
    z = encodings(0)
    places = np.asarray(z).reshape(-1, FEATURES)
    fair = len(places) / CODEBOOK
    counts = jnp.array([fair, 1.1 * DEAD * fair, 0.9 * DEAD * fair, 0])
    codebook = {"sums": counts[:, None] * 7, "counts": counts}
    codebook["sums"] = jnp.broadcast_to(codebook["sums"], (CODEBOOK, FEATURES))
    _, after = trained(codebook, z, 0, 1.0)
    codes = after["sums"] / after["counts"][:, None]
    np.testing.assert_allclose(codes[:2], 7, rtol=1e-6)
    np.testing.assert_array_equal(after["counts"][:2], counts[:2])
    np.testing.assert_allclose(after["counts"][2:], fair)
    for code in codes[2:]:
        assert np.isclose(places, code, rtol=1e-5).all(-1).any()
    other = trained(codebook, z, 1, 1.0)[1]
    assert np.any(other["sums"][2:] != after["sums"][2:])


def test_codes_change_in_training_alone():
    config, channels = VQ
    head, variables, z = Head(config, channels), filled(config, channels), normal(3, 1, 2, 2, 3, channels)
    _, moved = head.apply(variables, z, False, mutable="codebook")
    jax.tree.map(np.testing.assert_array_equal, dict(moved), variables)
    initial = head.init({"params": jax.random.key(0), "latent": jax.random.key(1)}, z, True)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(initial))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(3,), (40,), (4, 3, 2)]), st.integers(1, 4), st.integers(0, 99))
def test_code_statistics(group_codes, skew, seed):
    random = np.random.default_rng(seed)
    indices = np.stack(
        [(codes * random.uniform(size=(2, 1, 3, 4)) ** skew).astype(np.int32) for codes in group_codes], axis=-1
    )
    counts: dict[tuple[int, ...], int] = {}
    for place in indices.reshape(-1, len(group_codes)).tolist():
        counts[tuple(place)] = counts.get(tuple(place), 0) + 1
    share = np.array(list(counts.values())) / 24
    ours = statistics(jnp.asarray(indices), group_codes)
    np.testing.assert_allclose(ours["code_perplexity"], np.exp(-(share * np.log(share)).sum()), rtol=1e-5)
    np.testing.assert_allclose(ours["code_usage"], len(counts) / min(math.prod(group_codes), 24), rtol=1e-6)


@pytest.mark.parametrize(CODES, HEADS, **names)
def test_joint_indices_number_all_codes(config, channels):
    group_codes = config.group_codes(channels)
    joint = joint_index(every_index(config, channels), group_codes).ravel()
    assert joint.tolist() == list(range(math.prod(group_codes)))


def test_code_statistics_of_one_code_and_of_all_alike():
    one = statistics(jnp.zeros((2, 1, 3, 4, 1), jnp.int32), (40,))
    assert one == {"code_perplexity": 1, "code_usage": jnp.float32(1 / 24)}
    alike = statistics(jnp.arange(24).reshape(2, 1, 3, 4, 1), (40,))
    np.testing.assert_allclose(alike["code_perplexity"], 24, rtol=1e-5)
    assert alike["code_usage"] == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"groups": 2}, "groups is for the head 'lfq', not for 'continuous'"),
        ({"name": "fsq", "levels": (3,), "groups": 2}, "groups is for the head 'lfq', not for 'fsq'"),
        ({"name": "lfq", "levels": (3, 3)}, "levels is for the head 'fsq', not for 'lfq'"),
        ({"name": "kl", "codes": 8}, "codes is for the head 'vq', not for 'kl'"),
        ({"name": "fsq"}, "the head 'fsq' needs levels of at least 2, such as (8, 8, 8, 5, 5, 5)"),
        ({"name": "fsq", "levels": (3, 1)}, "the head 'fsq' needs levels of at least 2, such as (8, 8, 8, 5, 5, 5)"),
        ({"name": "vq"}, "the head 'vq' needs codes, the size of its codebook"),
        ({"name": "lfq", "temperature": 0.0}, "temperature=0.0 is not above 0"),
    ],
)
def test_heads_that_can_not_be_are_refused(knobs, message):
    with pytest.raises(ValueError) as refusal:
        HeadConfig(**knobs)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        (HeadConfig("lfq", groups=2), 5, "head.groups=2 does not divide latent_channels=5"),
        (HeadConfig("fsq", levels=(3, 3)), 3, "head.levels has 2 entries and latent_channels is 3"),
        (HeadConfig("lfq"), 32, "the head has 2^31 codes or more"),
        (HeadConfig("lfq", groups=4), 32, "the head has 2^31 codes or more"),
        (HeadConfig("fsq", levels=(1000,) * 4), 4, "the head has 2^31 codes or more"),
    ],
)
def test_heads_that_do_not_fit_the_latents_are_refused(config, channels, message):
    with pytest.raises(ValueError) as refusal:
        TokenizerConfig(channels, 2, (1, 1), ((2, 2, 2),), 1, 1, head=config)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_heads_that_fit_are_taken():
    HeadConfig("lfq", groups=2).check(18)
    HeadConfig("lfq").check(30)
    HeadConfig("fsq", levels=(8, 8, 8, 5, 5, 5)).check(6)
    HeadConfig("vq", codes=2**20).check(4)
    HeadConfig().check(99)
    assert [HeadConfig(name).inputs(4) for name in ("continuous", "kl", "lfq")] == [4, 8, 4]
