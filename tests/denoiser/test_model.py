"""The denoiser equals a plain loop over its blocks' equations, in packs as clip by clip, and sees nothing else."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import cycles, twin, waves
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import filled, normal, places_of

from walt_jax.denoiser.dit_block import DiTConfig
from walt_jax.denoiser.latte_block import LatteConfig
from walt_jax.denoiser.layout import Layout, Needs, PackRows, make_pack, place_clips
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.sinusoids import timestep_embedding
from walt_jax.denoiser.stdit_block import STDiTConfig
from walt_jax.denoiser.uvit_block import UViTConfig
from walt_jax.denoiser.vdt_block import VDTConfig
from walt_jax.denoiser.walt_block import WaltConfig
from walt_jax.parallel.cost import flops_by_module

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = WaltConfig(dim=16, heads=2, layers=2, windows=((1, None, None), (None, 2, 2)))
BOUNDS = (3, 3, 4)
VIDEO, IMAGE = (2, 2, 4), (1, 2, 4)
PACKS = [[VIDEO, IMAGE, VIDEO], [(3, 3, 3), (1, 3, 3)]]  # the second's clips are no multiples of the windows
CLIPS = [(pack, segment) for pack, grids in enumerate(PACKS) for segment in range(len(grids))]
TOKENS, CLASSES, CHANNELS = 44, 5, 3
PLACES = places_of(PACKS, TOKENS)
MASK = np.array([[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], bool)
LOW = normal(8, 2, 2, 1, 2, CHANNELS)  # of the two videos


@functools.cache
def layout(config, most=2):
    places = place_clips(PACKS, TOKENS, 3)
    windows = config.attention_windows
    needs = Needs.of(*places, windows, config.isolate_images)
    rows = PackRows.choose([needs], most, config.text_windows, config.text_alone)
    return Layout(pack=make_pack(*places, windows, rows, config.isolate_images))


def inputs(config):
    """(noisy, time, condition, estimate) of all packs."""
    condition = Condition()
    if config.reads_text:
        condition = condition.replace(text=normal(1, 2, 3, 4, 5), text_mask=MASK)
    if config.classes:
        condition = condition.replace(label=np.arange(6).reshape(2, 3))
    if config.frame_prediction:
        observed_mask = (np.random.default_rng(3).random((2, TOKENS, 1)) < 0.5).astype(np.float32)
        condition = condition.replace(observed=normal(4, 2, TOKENS, CHANNELS), observed_mask=observed_mask)
    time = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    estimate = normal(2, 2, TOKENS, CHANNELS) if config.self_conditioning else None
    return normal(0, 2, TOKENS, CHANNELS), time, condition, estimate


def of_clips(values, clips):
    """What is left of the packs' inputs for equal clips."""

    def part(leaf):
        if leaf.shape[1] == TOKENS:
            return np.stack([leaf[pack][PLACES[pack, :, 0] == segment] for pack, segment in clips])
        return np.stack([leaf[pack][[segment]] for pack, segment in clips])

    return jax.tree.map(part, values)


def arguments(values, layout):
    noisy, time, condition, estimate = values
    return noisy, time, condition, layout, estimate


@functools.cache
def parameters(config):
    """Those of a scan are the unrolled model's, stacked."""
    plain = dataclasses.replace(config, scan=False, remat="none")
    values = inputs(plain)
    if plain.upscale > 1 or plain.output_conv:
        values = videos(plain)
        params = filled(Denoiser(plain, BOUNDS), *arguments(values, Layout(grid=VIDEO)))["params"]
    else:
        params = filled(Denoiser(plain, BOUNDS), *arguments(values, layout(plain)))["params"]
    if not config.scan:
        return params
    stacked = {name: leaf for name, leaf in params.items() if not name.startswith("cycle")}
    return stacked | {"cycles": jax.tree.map(lambda *leaves: np.stack(leaves), *cycles(params, plain))}


def videos(config):
    """The inputs of the clips of two frames."""
    noisy, time, condition, estimate = of_clips(inputs(config), [(0, 0), (0, 2)])
    if config.upscale > 1:
        condition = condition.replace(low_res=LOW, low_res_time=np.array([[0.1], [0.2]], np.float32))
    return noisy, time, condition, estimate


@functools.cache
def compiled(config):
    return jax.jit(lambda params, *arguments: Denoiser(config, BOUNDS).apply({"params": params}, *arguments))


def twins(config, grid, values):
    """The twin of equal clips."""

    def clip(number):
        return jax.tree.map(lambda leaf: leaf[number, 0] if leaf.shape[1] == 1 else leaf[number], values)

    params = parameters(config)
    return np.stack([twin(params, config, BOUNDS, grid, *clip(number)) for number in range(len(values[0]))])


SIZES = {"dim": 16, "heads": 2, "layers": 2}
FRAME, TIME, PATCH = (1, None, None), (None, 1, 1), (None, 2, 2)
# Each family, and each value of each knob with most values of the others.
COVERING = [
    CONFIG,
    dataclasses.replace(
        CONFIG, positions="fractional", relative="rotary", adaln_rank=None, cross_attention=False, classes=CLASSES
    ),
    dataclasses.replace(
        CONFIG, positions="none", relative="none", cross_attention=False, isolate_images=True, frame_prediction=True
    ),
    dataclasses.replace(CONFIG, relative="rotary", isolate_images=True),
    dataclasses.replace(
        CONFIG,
        positions="fractional",
        cross_attention=False,
        classes=CLASSES,
        isolate_images=True,
        windows=(PATCH,),
        scan=True,
    ),
    dataclasses.replace(
        CONFIG, positions="none", adaln_rank=None, relative="bias", qk_norm=False, self_conditioning=False
    ),
    dataclasses.replace(
        CONFIG,
        positions="fractional",
        relative="none",
        adaln_rank=3,
        mlp_ratio=2,
        classes=CLASSES,
        frame_prediction=True,
    ),
    DiTConfig(**SIZES, windows=(FRAME, PATCH), cross_attention=False, classes=CLASSES),
    DiTConfig(**SIZES, windows=(PATCH,), conditioning="adaln", qk_norm=True, self_conditioning=True),
    DiTConfig(
        **SIZES,
        windows=(FRAME, PATCH),
        embedders_per_block=True,
        time_frequencies="diffusers",
        classes=CLASSES,
        cross_attention=False,
        positions="none",
    ),
    DiTConfig(
        **SIZES,
        windows=(PATCH,),
        conditioning="in_context",
        cross_attention=False,
        classes=CLASSES,
        relative="rotary",
        isolate_images=True,
        scan=True,
    ),
    DiTConfig(**SIZES, windows=(FRAME, PATCH), conditioning="cross_attention", classes=CLASSES),
    UViTConfig(dim=16, heads=2, layers=3, windows=((None, None, None),)),
    UViTConfig(dim=16, heads=2, layers=3, windows=(PATCH,), classes=CLASSES, isolate_images=True),
    LatteConfig(**SIZES, windows=(FRAME, TIME), cross_attention=False, classes=CLASSES),
    LatteConfig(**SIZES, windows=(FRAME, TIME)),  # from text
    LatteConfig(**SIZES, windows=(FRAME, TIME), split="attentions", cross_attention=False, scan=True),
    LatteConfig(**SIZES, windows=(FRAME, TIME), split="attentions"),
    LatteConfig(**SIZES, windows=(FRAME, TIME), split="heads", cross_attention=False, frame_prediction=True),
    VDTConfig(**SIZES, cross_attention=False, classes=CLASSES, frame_prediction=True, scan=True),
    VDTConfig(**SIZES),
    STDiTConfig(**SIZES, scan=True),
    STDiTConfig(**SIZES, classes=CLASSES, cross_attention=False),
]


@pytest.mark.parametrize("config", COVERING, ids=lambda config: config.block)
def test_in_packs_as_clip_by_clip_the_denoiser_equals_the_papers_equations(config):
    params, values = parameters(config), inputs(config)
    packed = np.asarray(compiled(config)(params, *arguments(values, layout(config))))
    for clip in CLIPS:
        pack, segment = clip
        ours = packed[pack][PLACES[pack, :, 0] == segment]
        expected = twins(config, PACKS[pack][segment], of_clips(values, [clip]))[0]
        np.testing.assert_allclose(ours, expected, rtol=5e-4, atol=5e-4)
    # Two videos in a batch; images, too, where they are something else.
    grids = [(VIDEO, [(0, 0), (0, 2)])] + [(IMAGE, [(0, 1)])] * config.isolate_images
    for grid, clips in grids:
        ours = compiled(config)(params, *arguments(of_clips(values, clips), Layout(grid=grid)))
        expected = np.stack([packed[pack][PLACES[pack, :, 0] == segment] for pack, segment in clips])
        np.testing.assert_allclose(ours, expected, rtol=5e-4, atol=5e-4)


def test_the_last_convolution_equals_its_equations():
    """Only of equal clips: in packs it has no neighbours."""
    config = UViTConfig(dim=16, heads=2, layers=1, windows=((None, None, None),), output_conv=True)
    plain, values = dataclasses.replace(config, output_conv=False), videos(config)
    conv = {"kernel": normal(8, 1, 3, 3, CHANNELS, CHANNELS), "bias": normal(9, CHANNELS)}
    params = parameters(plain) | {"conv_out": conv}
    ours = compiled(config)(params, *arguments(values, Layout(grid=VIDEO)))
    clips = [jax.tree.map(lambda leaf, n=n: leaf[n, 0] if leaf.shape[1] == 1 else leaf[n], values) for n in range(2)]
    expected = [twin(params, config, BOUNDS, VIDEO, *clip) for clip in clips]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_upscaling_equals_its_equations():
    config = dataclasses.replace(CONFIG, upscale=2, windows=((None, None, None),), layers=1, cross_attention=False)
    values = videos(config)
    ours = compiled(config)(parameters(config), *arguments(values, Layout(grid=VIDEO)))
    np.testing.assert_allclose(ours, twins(config, VIDEO, values), rtol=1e-4, atol=1e-4)


ONE = dataclasses.replace(CONFIG, layers=1, windows=((None, 2, 2),))  # little to compile
WEIGHTS = (PLACES[..., :1] >= 0) * normal(5, 2, TOKENS, CHANNELS)


@functools.cache
def compiled_gradients(config):
    def loss(params, noisy, time, text, estimate, condition, layout, weights):
        condition = condition.replace(text=text)
        out = Denoiser(config, BOUNDS).apply({"params": params}, noisy, time, condition, layout, estimate)
        return (out * weights).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


def gradients(config, values, layout, weights):
    """(gradients of parameters, noisy, time, text and estimate, output)."""
    noisy, time, condition, estimate = values
    text, condition = condition.text, condition.replace(text=None)
    return compiled_gradients(config)(parameters(config), noisy, time, text, estimate, condition, layout, weights)


def in_packs(weights, config=ONE, **changed):
    noisy, *others = inputs(config)
    return gradients(config, (changed.get("noisy", noisy), *others), layout(config, most=1), weights)


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), one, other)


def test_computing_again_in_packs_changes_neither_values_nor_gradients():
    close(in_packs(WEIGHTS, dataclasses.replace(ONE, remat="dots")), in_packs(WEIGHTS))


@pytest.mark.parametrize(
    ("scan", "remat"), [(False, "block"), (True, "dots"), (False, "narrow"), (True, "dots_on_host")]
)
def test_scanning_and_computing_again_change_neither_values_nor_gradients(scan, remat):
    plain = dataclasses.replace(ONE, layers=2, cross_attention=False)
    changed = dataclasses.replace(plain, scan=scan, remat=remat)
    others = videos(plain), Layout(grid=VIDEO), WEIGHTS[:, :16]
    (of_params, *of_inputs), out = gradients(changed, *others)
    if scan:
        unstacked = {f"cycle{number}": cycle for number, cycle in enumerate(cycles(of_params, changed))}
        of_params = {name: leaf for name, leaf in of_params.items() if name != "cycles"} | unstacked
    (of_plain_params, *of_plain_inputs), plain_out = gradients(plain, *others)
    close([of_params, of_inputs, out], [of_plain_params, of_plain_inputs, plain_out])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_less_is_saved_the_more_is_computed_again(dtype):
    """Operations of gradients, in units of the matrix products with weights of one block's forward pass."""
    config = dataclasses.replace(ONE, layers=2, cross_attention=False, dtype=dtype)
    counts = {}
    for remat in ("none", "dots", "narrow", "block"):
        changed = dataclasses.replace(config, remat=remat)
        module, (noisy, time, condition, estimate) = Denoiser(changed, VIDEO), videos(changed)
        arguments = noisy, time, condition, Layout(grid=VIDEO), estimate
        params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *arguments))
        by_module = flops_by_module(jax.grad(lambda p, m=module, a=arguments: m.apply(p, *a).sum()), params)
        counts[remat] = {
            name: sum(count for path, count in by_module.items() if path.endswith(name))
            for name in ("query", "mlp_in", "mlp_out")
        }
    one = {name: count // 3 for name, count in counts["none"].items()}
    again = {remat: {name: (counts[remat][name] - 3 * one[name]) // one[name] for name in one} for remat in counts}
    assert again["none"] == again["dots"] == {"query": 0, "mlp_in": 0, "mlp_out": 0}
    assert again["narrow"] == {"query": 0, "mlp_in": 1, "mlp_out": 0}
    assert again["block"]["query"] == again["block"]["mlp_in"] == 1


def test_a_clip_depends_on_all_of_its_own_inputs_and_on_no_other_clips():
    for pack, segment in CLIPS:
        own = np.zeros((2, TOKENS, 1), np.float32)
        own[pack, PLACES[pack, :, 0] == segment] = 1
        (_, *of_inputs), _ = in_packs(own * WEIGHTS)
        mine = np.zeros((2, 3), bool)
        mine[pack, segment] = True
        for gradient, expected in zip(
            of_inputs, (own[..., 0] > 0, mine, mine[..., None] & MASK, own[..., 0] > 0), strict=True
        ):
            depends = np.asarray(gradient) != 0
            depends = depends if depends.ndim == expected.ndim else depends.any(-1)
            np.testing.assert_array_equal(depends, expected)


def test_a_clip_depends_on_its_own_label_alone():
    config = COVERING[1]
    noisy, time, condition, estimate = inputs(config)
    label = condition.label.copy()
    label[0, 1] = 4
    out, other = (
        np.asarray(compiled(config)(parameters(config), noisy, time, Condition(label=each), layout(config), estimate))
        for each in (condition.label, label)
    )
    np.testing.assert_array_equal((out != other).any(-1), (PLACES[:, :, 0] == 1) & [[True], [False]])


@pytest.mark.parametrize("value", [1e3, 1e30, np.nan])
def test_what_only_fills_a_pack_up_reaches_no_clip_and_no_gradient(value):
    of_all, out = in_packs(WEIGHTS)
    inside = PLACES[..., 0] >= 0
    noisy = np.where(inside[..., None], inputs(ONE)[0], value).astype(np.float32)
    of_dirty, dirty_out = in_packs(WEIGHTS, noisy=noisy)
    np.testing.assert_array_equal(out[inside], dirty_out[inside])
    jax.tree.map(np.testing.assert_array_equal, of_all, of_dirty)


def test_at_initialisation_the_output_is_zero():
    config = dataclasses.replace(CONFIG, layers=1, windows=((None, None, None),), cross_attention=False)
    output, _ = jax.jit(Denoiser(config, BOUNDS).init_with_output)(
        jax.random.key(0), *arguments(videos(config), Layout(grid=VIDEO))
    )
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, np.zeros((2, 16, CHANNELS)))


def test_families_start_as_their_papers_say():
    """The deviations of kernels; U-ViT's [0.02], DiT's Xavier's, queries' as part of one matrix for three."""
    sizes = {"dim": 64, "heads": 2, "layers": 1, "cross_attention": False, "classes": CLASSES}
    dim, plain = 64, (jnp.zeros((1, 8, CHANNELS)), jnp.zeros((1, 1)), Condition(label=jnp.zeros((1, 1), int)))
    window = {"windows": ((None, None, None),)}

    def deviations(config):
        arguments = *plain, Layout(grid=(2, 2, 2))
        params = nn.meta.unbox(
            jax.jit(Denoiser(config, (2, 2, 2)).init)(jax.random.key(0, impl="unsafe_rbg"), *arguments)
        )["params"]
        flat = {"/".join(key): leaf for key, leaf in flatten_dict(params).items()}
        return {name: float(leaf.std()) for name, leaf in flat.items() if not name.endswith(("bias", "scale"))}

    dit = deviations(DiTConfig(**sizes, **window))
    block = "cycle0/block0/"
    assert dit[f"{block}self_attention/query/kernel"] == pytest.approx((2 / (4 * dim)) ** 0.5, rel=0.05)
    assert dit[f"{block}self_attention/out/kernel"] == pytest.approx((2 / (2 * dim)) ** 0.5, rel=0.05)
    assert dit[f"{block}mlp_in/kernel"] == pytest.approx((2 / (5 * dim)) ** 0.5, rel=0.05)
    for name in ("time_in/kernel", "time_out/kernel"):
        assert dit[name] == pytest.approx(0.02, rel=0.05)
    assert dit["patch_out/kernel"] == dit[f"{block}adaln/kernel"] == dit["adaln_out/kernel"] == 0
    uvit = deviations(UViTConfig(**sizes, **window))
    for name in ("patch_in/kernel", f"{block}self_attention/query/kernel", f"{block}mlp_out/kernel"):
        assert uvit[name] == pytest.approx(0.02, rel=0.12)
    assert uvit["label_embedding"] == pytest.approx(1, rel=0.15)
    assert uvit["patch_out/kernel"] > 0.015 and "time_in/kernel" not in uvit
    stdit = deviations(STDiTConfig(**sizes))
    assert stdit[f"{block}temporal_attention/out/kernel"] == 0 != stdit[f"{block}self_attention/out/kernel"]
    assert stdit["adaln/kernel"] == pytest.approx(0.02, rel=0.05)
    assert stdit[f"{block}adaln_table"] == pytest.approx(dim**-0.5, rel=0.15)


def test_padding_of_the_text_has_no_effect():
    noisy, time, condition, estimate = inputs(CONFIG)
    other = condition.replace(text=np.where(MASK[..., None], condition.text, 1e3 * normal(7, *condition.text.shape)))
    out, changed = (
        compiled(CONFIG)(parameters(CONFIG), noisy, time, each, layout(CONFIG), estimate) for each in (condition, other)
    )
    # Of tokens of a clip without any text too: that it has none is not lost in rounding.
    np.testing.assert_allclose(changed, out, rtol=1e-5, atol=1e-5)


def test_without_an_estimate_it_is_zeros():
    noisy, time, condition, estimate = videos(CONFIG)
    place = Layout(grid=VIDEO)
    none, zeros, something = (
        compiled(CONFIG)(parameters(CONFIG), noisy, time, condition, place, each)
        for each in (None, 0 * estimate, estimate)
    )
    np.testing.assert_allclose(none, zeros, rtol=1e-5, atol=1e-6)
    assert np.abs(something - zeros).max() > 1e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_the_output_has_32_bits_whatever_the_computation(packed, scan):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", scan=scan)
    values = arguments(inputs(config), layout(config)) if packed else arguments(videos(config), Layout(grid=VIDEO))
    model = Denoiser(config, BOUNDS)
    output, boxed = jax.eval_shape(model.init_with_output, jax.random.key(0), *values)
    assert (output.shape, output.dtype) == (values[0].shape, jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(boxed))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"scan": True, "positions": "fractional", "classes": CLASSES},
        {"adaln_rank": None, "relative": "rotary", "frame_prediction": True, "cross_attention": False},
        {"upscale": 2},
    ],
)
def test_every_parameter_has_a_name_for_each_axis(changed):
    config = dataclasses.replace(CONFIG, **changed)
    boxed = jax.eval_shape(
        Denoiser(config, BOUNDS).init, jax.random.key(0), *arguments(videos(config), Layout(grid=VIDEO))
    )
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim for leaf in leaves)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), st.sampled_from([1, 4]))
def test_timestep_embedding(times, half):
    embedded = timestep_embedding(jnp.array(times, jnp.float32), 2 * half)
    for row, time in zip(embedded, times, strict=True):
        np.testing.assert_allclose(row, waves(1000 * time, 2 * half), atol=1e-3)
