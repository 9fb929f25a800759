"""LoRA's merged weights against layers that compute both products; its files against PEFT's layout."""

import dataclasses
import json
import pathlib
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from generation.test_generator import make
from safetensors import safe_open

from walt_jax.errors import UserError
from walt_jax.generation import lora, lora_files
from walt_jax.generation.latent_diffusion import unboxed
from walt_jax.generation.lora import A, B, LoraConfig
from walt_jax.generation.lora_files import Chosen
from walt_jax.generation.request import Request
from walt_jax.layers import Linear

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("cross_attention", "mlp_in", "text.query_0"))


@pytest.fixture(scope="module")
def generator():
    return make()


def pairs_of(generator, config=CONFIG, seed=0):
    """A and B as if trained: B is not zero."""
    pairs = unboxed(lora.fresh(jax.eval_shape(generator.model.init, jax.random.key(0)), config, jax.random.key(seed)))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(0, 0.1, leaf.shape)), pairs)


def test_merged_weights_are_those_of_the_definition_and_all_others_stay(generator):
    pairs = pairs_of(generator)
    merged = flatten_dict(lora.merged(generator.params, pairs, CONFIG.scale))
    changes, changed = flatten_dict(pairs), set()
    for path, leaf in flatten_dict(generator.params).items():
        if (*path[:-1], A) not in changes or path[-1] != "kernel":
            assert merged[path] is leaf
            continue
        changed.add("/".join(path[-3:-1]))
        a, b = (changes[*path[:-1], name] for name in (A, B))
        wanted = leaf.copy()
        for i, o in np.ndindex(leaf.shape):
            wanted[i, o] += 6.0 / 3 * sum(a[i, r] * b[r, o] for r in range(3))
        np.testing.assert_allclose(merged[path], wanted, rtol=1e-5, atol=1e-6)
    assert changed == {"text/query_0", "block0/mlp_in", "block1/mlp_in"} | {
        f"cross_attention/{name}" for name in ("query", "key", "value", "out")
    }


def test_a_merged_model_computes_what_layers_with_two_products_do(generator):
    """The twin: each linear layer adds α/r · (x A) B to its own product."""
    pairs, model = pairs_of(generator), generator.model
    changes = flatten_dict(pairs)
    noisy = model.tokens(jax.random.normal(jax.random.key(1), (1, *model.latent_shape)))
    ids = generator.captions.encode(["a red one"])[:, None]

    def run(params):
        condition = model.condition(params, ids, noisy, noisy[..., :4] * 0)
        return model.denoise(params, condition, model.layout)(noisy, jnp.full((1, 1), 0.5), noisy)

    def with_products(call, arguments, keywords, context):
        y = call(*arguments, **keywords)
        for name in ("denoiser", "text"):
            path = (name, *context.module.path)
            if isinstance(context.module, Linear) and (*path, A) in changes:
                seen.add(path)
                y = y + CONFIG.scale * (arguments[0] @ changes[*path, A]) @ changes[*path, B]
        return y

    seen = set()
    merged = run(lora.merged(generator.params, pairs, CONFIG.scale))
    with nn.intercept_methods(with_products):
        wanted = run(generator.params)
    assert len(seen) == len(changes) // 2
    np.testing.assert_allclose(merged, wanted, rtol=2e-4, atol=2e-5)
    assert np.abs(merged - run(generator.params)).max() > 1e-3


def test_a_new_lora_changes_nothing(generator):
    for own in (generator, make(scan=True)):
        fresh = lora.fresh(jax.eval_shape(own.model.init, jax.random.key(0)), LoraConfig(), jax.random.key(0))
        merged = lora.merged(own.params, unboxed(fresh), LoraConfig().scale)
        for before, after in zip(jax.tree.leaves(own.params), jax.tree.leaves(merged), strict=True):
            assert (np.asarray(before) == np.asarray(after)).all()
        for path, leaf in flatten_dict(unboxed(fresh)).items():
            assert bool(leaf.any()) == (path[-1] == A)
    with pytest.raises(UserError, match=r"has 'attn', and the model has no layer in such .*mlp_in"):
        lora.fresh(jax.eval_shape(generator.model.init, jax.random.key(0)), LoraConfig(targets=("attn",)), None)


@pytest.mark.parametrize("scan", [False, True])
def test_a_file_in_pefts_layout(tmp_path, scan):
    own = make(scan=scan)
    pairs, path = pairs_of(own), tmp_path / lora_files.FILE
    lora_files.write(path, pairs, CONFIG)
    cycle = ("cycles.0", "cycles") if scan else ("cycle0", "cycle0")
    with safe_open(path, framework="numpy") as opened:
        names = set(opened.keys())
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert opened.metadata()["format"] == "pt"
        down, up = (opened.get_tensor(f"transformer.{cycle[0]}.block1.mlp_in.lora_{x}.weight") for x in "AB")
    linear = 1 + 2 * 5  # a layer of the text encoder, five in each of two blocks
    assert len(names) == 2 * linear and "text_encoder.query_0.lora_A.weight" in names
    kernel, layer = own.params["denoiser"][cycle[1]]["block1"]["mlp_in"]["kernel"], pairs["denoiser"][cycle[1]]
    if scan:
        kernel, layer = kernel[0], jax.tree.map(lambda leaf: leaf[0], layer)
    # torch.nn.Linear's weight is [out, in]: A is [r, in], B [out, r], and the change α/r · B A.
    assert down.shape == (3, kernel.shape[0]) and up.shape == (kernel.shape[1], 3)
    assert about["transformer.r"] == 3 and about["transformer.lora_alpha"] == 6.0
    assert f"{cycle[0]}.block1.mlp_in" in about["transformer.target_modules"]
    assert about["text_encoder.target_modules"] == ["query_0"]
    change = 6.0 / 3 * (up @ down).T
    np.testing.assert_allclose(change, 2.0 * layer["block1"]["mlp_in"][A] @ layer["block1"]["mlp_in"][B], rtol=1e-5)
    merged = lora_files.with_loras(own.params, [Chosen(path)])
    wanted = lora.merged(own.params, pairs, CONFIG.scale)
    for one, two in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def test_several_add_up_with_their_weights(generator, tmp_path):
    paths = []
    for seed, config in enumerate((CONFIG, LoraConfig(rank=1, alpha=0.5, targets=("mlp_in",)))):
        paths.append(tmp_path / f"{seed}.safetensors")
        lora_files.write(paths[-1], pairs_of(generator, config, seed), config)
    zero, one, two, both = (
        lora_files.with_loras(generator.params, [Chosen(path, weight) for path, weight in chosen])
        for chosen in ([], [(paths[0], 1.0)], [(paths[1], 1.0)], [(paths[0], 0.5), (paths[1], -2.0)])
    )
    assert zero is generator.params
    for w, first, second, found in zip(*map(jax.tree.leaves, (zero, one, two, both)), strict=True):
        np.testing.assert_allclose(found, w + 0.5 * (first - w) - 2.0 * (second - w), rtol=1e-5, atol=1e-6)


def tensors_of(generator):
    """Of one layer, in PEFT's names without α: the scale is 1."""
    draw, name = np.random.default_rng(5), "transformer.cycle0.block0.mlp_in"
    high, wide = generator.params["denoiser"]["cycle0"]["block0"]["mlp_in"]["kernel"].shape[::-1]
    shapes = {f"{name}.lora_A.weight": (2, wide), f"{name}.lora_B.weight": (high, 2)}
    return {key: np.float32(draw.normal(size=shape)) for key, shape in shapes.items()}


def test_other_names_are_read(generator, tmp_path):
    """Without a header α is r; with kohya's names α stands next to A and B; values may be bfloat16."""
    a, b = tensors_of(generator).values()
    kohya = "lora_unet_cycle0_block0_mlp_in"
    other = "diffusion_model.cycle0.block0.mlp_in"
    files = {
        "peft": (tensors_of(generator), {}, 1.0),
        "plain header": (tensors_of(generator), {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 3}'}, 1.5),
        "comfy": ({f"{other}.lora_A.weight": a, f"{other}.lora_B.weight": b}, {}, 1.0),
        "kohya": (
            {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": np.float32([1])},
            {},
            0.5,
        ),
        "bfloat16": (jax.tree.map(lambda x: np.asarray(jnp.bfloat16(x)), tensors_of(generator)), {}, 1.0),
    }
    before = generator.params["denoiser"]["cycle0"]["block0"]["mlp_in"]["kernel"]
    for name, (tensors, header, scale) in files.items():
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(tensors, path, header)
        after = lora_files.with_loras(generator.params, [Chosen(path)])["denoiser"]["cycle0"]["block0"]["mlp_in"]
        rough = 0.1 if name == "bfloat16" else 1e-5
        np.testing.assert_allclose(after["kernel"] - before, scale * (b @ a).T, rtol=rough, atol=rough, err_msg=name)


NAME = "transformer.cycle0.block0.mlp_in"


@pytest.mark.parametrize(
    ("change", "header", "says"),
    [
        (lambda t: pickle.dumps(t), None, "can't be read as safetensors"),
        (lambda t: safetensors.numpy.save(t)[:-7], None, "can't be read as safetensors"),
        (lambda t: b"", None, "can't be read as safetensors"),
        (lambda t: {}, None, "has no LoRA in it"),
        (lambda t: {"model.weight": t[f"{NAME}.lora_A.weight"]}, None, "is no part of a LoRA"),
        (
            lambda t: t | {"transformer.blocks.0.lora_A.weight": np.zeros((2, 2))},
            None,
            "of another model: this",
        ),
        (lambda t: t | {f"{NAME}.lora_A.weight": np.zeros((2, 5), np.float32)}, None, "takes [r, 24] and [96, r]"),
        (lambda t: t | {f"{NAME}.lora_A.weight": np.zeros((0, 24), np.float32)}, None, "takes [r, 24] and [96, r]"),
        (lambda t: t | {f"{NAME}.lora_A.weight": np.zeros((2, 24), np.int32)}, None, "no floating-point numbers"),
        (lambda t: t | {f"{NAME}.lora_A.weight": np.full((2, 24), np.nan, np.float32)}, None, "not finite"),
        (lambda t: t | {f"{NAME}.alpha": np.zeros((0,), np.float32)}, None, "can't be read as safetensors"),
        (lambda t: {f"{NAME}.lora_A.weight": t[f"{NAME}.lora_A.weight"]}, None, "lacks A or B of transformer.cycle0"),
        (lambda t: t, "[1, 2", "has a header that can't be read"),
        (lambda t: t, "[1, 2]", "has a header that can't be read"),
        (lambda t: t, '{"transformer.use_dora": true}', "uses use_dora of PEFT"),
    ],
)
def test_other_files_are_refused_in_one_sentence(generator, tmp_path, change, header, says):
    path, changed = tmp_path / "lora.safetensors", change(tensors_of(generator))
    if isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        safetensors.numpy.save_file(changed, path, None if header is None else {"lora_adapter_metadata": header})
    with pytest.raises(UserError) as error:
        lora_files.with_loras(generator.params, [Chosen(path)])
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_names_a_lora(tmp_path):
    folder, file = tmp_path / "runs:1", tmp_path / "a.safetensors"
    folder.mkdir()
    for path in (folder / lora_files.FILE, file):
        path.write_bytes(b"")
    assert Chosen.parse(str(file)) == Chosen(file, 1.0)
    assert Chosen.parse(f"{file}:-0.5") == Chosen(file, -0.5)
    assert Chosen.parse(str(folder)) == Chosen(folder / lora_files.FILE, 1.0)
    assert Chosen.parse(f"{folder}:2").label == "runs:1:2"
    for text in (f"{file}:nan", f"{file}:1e9", str(tmp_path), f"{file}:much", str(pathlib.Path("nowhere"))):
        with pytest.raises(UserError, match=r"^--lora=.*; name|^--lora=.* such as 0\.8\.$"):
            Chosen.parse(text)


def test_samples_with_weight_0_are_those_without(generator, tmp_path):
    path = tmp_path / "lora.safetensors"
    lora_files.write(path, pairs_of(generator), CONFIG)
    request, found = [Request("a red one", 3)], []
    for weight in (None, 0.0, 1.0):
        chosen = [] if weight is None else [Chosen(path, weight)]
        changed = dataclasses.replace(generator, params=lora_files.with_loras(generator.params, chosen))
        found.append(changed.latents(request)[0])
    assert (found[0] == found[1]).all() and np.abs(found[0] - found[2]).max() > 1e-3
