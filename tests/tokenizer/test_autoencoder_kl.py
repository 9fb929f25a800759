"""Stable Diffusion's autoencoder against diffusers', from files of each layout that its weights were published in."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from walt_jax.errors import UserError
from walt_jax.tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from walt_jax.tokenizer.autoencoder_kl_weights import DIFFUSERS, load_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "autoencoder_kl.safetensors"
CONFIG = AutoencoderKLConfig((8, 12, 16), layers_per_block=2, latent_channels=4, norm_groups=4, scaling_factor=0.3)
ATTENTION = "mid_block.attentions.0"

pytestmark = pytest.mark.usefixtures("quick_compilation")


def to_diffusers(params) -> dict[str, np.ndarray]:
    """The parameters as diffusers' AutoencoderKL names and shapes them, float32; `load_weights` reads them again."""
    flat = flatten_dict(nn.meta.unbox(params), sep=".")
    scales = len({ours.split("_")[0] for ours in flat if ours.startswith("encoder.scale")})
    tensors = {}
    for ours, value in flat.items():
        tensor = np.asarray(value, np.float32)
        if tensor.ndim == 2 and ".mid_attention." not in ours:
            tensor = tensor[None, None]
        tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        tensors[DIFFUSERS.name(ours, scales)] = np.ascontiguousarray(tensor)
    return tensors


def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN)


def weights() -> dict[str, np.ndarray]:
    """As diffusers names them."""
    return {name.removeprefix("weights."): tensor for name, tensor in golden().items() if name.startswith("weights.")}


def metadata(name: str) -> dict:
    with safe_open(GOLDEN, framework="numpy") as file:
        return json.loads(file.metadata()[name])


def convolved(tensors: dict[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Linear weights of these names as convolutions of one pixel."""
    return {
        name: tensor[:, :, None, None] if tensor.ndim == 2 and any(part in name for part in names) else tensor
        for name, tensor in tensors.items()
    }


def written(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> pathlib.Path:
    """A file with the tensors, and beside it the config.json: the golden file's own unless given."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path)
    (folder / "config.json").write_text(json.dumps(metadata("config") if config is None else config))
    return path


def refusal(path: pathlib.Path) -> str:
    """The one sentence about it."""
    with pytest.raises(UserError) as error:
        load_weights(path)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def assert_equal_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(ours, theirs):
    """To 1e-5 of the largest value, and nearly everywhere of the value itself."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    config, params = load_weights(written(tmp_path_factory.mktemp("weights"), weights()))
    assert config == CONFIG
    return params


@pytest.fixture(scope="module")
def run(params):
    """Calls a method of the model, compiled."""
    model = AutoencoderKL(CONFIG)
    compiled = jax.jit(lambda p, method, *args: model.apply({"params": p}, *args, method=method), static_argnums=1)
    return lambda method, *args: compiled(params, method, *args)


def test_encoding_equals_diffusers(run):
    expected = golden()
    mean, logvar = run("moments", expected["images"])
    assert_close(mean, expected["mean"])
    assert_close(logvar, expected["logvar"])
    # Both bounds of the log variance were reached, and not everywhere.
    for bound in (-30, 20):
        assert 0 < np.mean(expected["logvar"] == bound) < 0.25


def test_decoding_equals_diffusers(run):
    expected = golden()
    assert_close(run("decode", expected["latents"]), expected["pixels"])


def test_latents_are_scaled_means_or_samples(run):
    expected = golden()
    images = expected["images"]
    assert_close(run("encode", images), 0.3 * expected["mean"])
    one, other = (run("encode", images, jax.random.key(seed)) for seed in (0, 1))
    assert jnp.any(one != other)
    # Where the deviation is that of the lower bound, e^-15, a sample is the mean; elsewhere it is as far as it says.
    noise = (one / 0.3 - expected["mean"]) / np.exp(0.5 * expected["logvar"])
    wide = expected["logvar"] > -10
    assert np.abs(np.asarray(noise)[wide].mean()) < 0.2
    assert np.asarray(noise)[wide].std() == pytest.approx(1, abs=0.1)
    narrow = expected["logvar"] < -29
    np.testing.assert_allclose(np.asarray(one)[narrow], 0.3 * expected["mean"][narrow], atol=1e-5)


def test_a_video_is_its_frames_and_a_call_its_reconstruction(run):
    video = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 12, 3)).astype(np.float32)
    latents = run("encode", video)
    assert latents.shape == (2, *CONFIG.latent_shape(3, 8, 12)) == (2, 3, 2, 3, 4)
    pixels = run("decode", latents)
    assert pixels.shape == video.shape
    for clip, frame in np.ndindex(2, 3):
        alone = run("encode", video[clip, frame][None])
        assert_close(latents[clip, frame], alone[0])
        assert_close(pixels[clip, frame], run("decode", alone)[0])
    assert_close(run("__call__", video), pixels)


def test_sides_that_the_stride_does_not_divide_are_refused(run):
    assert CONFIG.strides == (1, 4, 4)
    assert AutoencoderKLConfig().latent_shape(16, 256, 320) == (16, 32, 40, 4)
    for shape in ((1, 10, 8, 3), (1, 8, 10, 3)):
        with pytest.raises(ValueError, match="multiples of 4 pixels a side"):
            run("encode", np.zeros(shape, np.float32))


def test_bfloat16_is_near(params):
    expected = golden()
    model = AutoencoderKL(dataclasses.replace(CONFIG, dtype="bfloat16"))
    run = jax.jit(lambda p, x, method: model.apply({"params": p}, x, method=method), static_argnums=2)
    latents, pixels = run(params, expected["images"], "encode"), run(params, expected["latents"], "decode")
    for ours, theirs in ((latents, 0.3 * expected["mean"]), (pixels, expected["pixels"])):
        assert ours.dtype == jnp.float32
        error = np.abs(ours - theirs).mean() / np.abs(theirs).mean()
        assert 1e-4 < error < 0.05  # not float32 either


def test_the_published_size():
    """The counts and the number of tensors of stabilityai/sd-vae-ft-mse."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = nn.meta.unbox(
        jax.eval_shape(AutoencoderKL(AutoencoderKLConfig()).init, jax.random.key(0), image)["params"]
    )
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert sum(sizes.values()) == 83_653_863
    assert sizes["decoder"] + sizes["post_quant_conv"] == 49_490_199
    assert len(jax.tree.leaves(params)) == 248


def test_parameters_have_logical_axes():
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(AutoencoderKL(CONFIG).init, jax.random.key(0), image)["params"]
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim


# Files


def old(tensors):
    return {metadata("old")[name]: tensor for name, tensor in tensors.items()}


def latent_diffusion(tensors):
    named = {metadata("latent_diffusion")[name]: tensor for name, tensor in tensors.items()}
    return convolved(named, ("mid.attn_1",))


LAYOUTS = {
    "diffusers": lambda tensors: tensors,
    "old diffusers": old,
    "old diffusers, convolutions": lambda tensors: convolved(old(tensors), (ATTENTION,)),
    "latent-diffusion": latent_diffusion,
    "latent-diffusion's training": lambda tensors: {
        **latent_diffusion(tensors),
        "loss.logvar": np.zeros((), np.float32),
        "model_ema.decay": np.zeros((), np.float32),
        "model_ema.num_updates": np.zeros((), np.int32),
    },
    "a whole model": lambda tensors: {
        **{f"first_stage_model.{name}": tensor for name, tensor in latent_diffusion(tensors).items()},
        "model.diffusion_model.out.0.weight": np.zeros(3, np.float32),
        "encoder.conv_in.weight": np.zeros(3, np.float32),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(tmp_path, params, layout):
    config, ours = load_weights(written(tmp_path, LAYOUTS[layout](weights())), "bfloat16")
    assert config == dataclasses.replace(CONFIG, dtype="bfloat16")
    assert_equal_trees(ours, params)


def test_the_parameters_are_those_that_the_model_makes(params):
    made = jax.eval_shape(AutoencoderKL(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    made = nn.meta.unbox(made)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_back_to_diffusers_and_again(tmp_path, params):
    tensors = to_diffusers(params)
    assert tensors.keys() == weights().keys()
    for name, tensor in weights().items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], tensor)
    _, again = load_weights(written(tmp_path, tensors))
    assert_equal_trees(again, params)


@pytest.fixture(scope="module")
def inferable():
    """Tensors of a model whose sizes but for Stable Diffusion's 32 groups are its own."""
    config = AutoencoderKLConfig((32, 64), layers_per_block=1, latent_channels=3)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = nn.meta.unbox(jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)["params"])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    return config, params


@pytest.mark.parametrize("stated", [None, {}, {"_class_name": "AutoencoderKL", "sample_size": 256}])
def test_sizes_that_no_config_states_are_those_of_the_tensors(tmp_path, inferable, stated):
    config, params = inferable
    path = written(tmp_path, to_diffusers(params), stated)
    if stated is None:
        (tmp_path / "config.json").unlink()
    found, ours = load_weights(path)
    assert found == config
    assert_equal_trees(ours, params)


def test_bfloat16_files_are_read(tmp_path, inferable):
    config, params = inferable
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in to_diffusers(params).items()}
    found, ours = load_weights(written(tmp_path, tensors, {}))
    assert found == config
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2**-8), ours, params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_tensor_is_named_as_the_file_names_its_like(tmp_path, layout):
    tensors = LAYOUTS[layout](weights())
    encoder, decoder = "encoder.mid.attn_1.q.weight", "decoder.up.1.upsample.conv.bias"
    if "diffusers" in layout:
        query = "query" if "old" in layout else "to_q"
        encoder, decoder = f"encoder.{ATTENTION}.{query}.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"
    prefix = "first_stage_model." if layout == "a whole model" else ""
    for missing in (prefix + encoder, prefix + decoder):
        left = {name: tensor for name, tensor in tensors.items() if name != missing}
        assert len(left) == len(tensors) - 1
        message = refusal(written(tmp_path, left))
        assert f" lack {missing!r}; give the file that {tmp_path}/config.json belongs to." in message


@pytest.mark.parametrize(
    "missing",
    ["encoder.down_blocks.0.resnets.0.conv1.weight", "post_quant_conv.weight", "decoder.conv_norm_out.weight"],
)
def test_a_missing_tensor_is_named_where_no_config_states_the_sizes(tmp_path, inferable, missing):
    left = {name: tensor for name, tensor in to_diffusers(inferable[1]).items() if name != missing}
    assert f" lack {missing!r}; give a complete file, or " in refusal(written(tmp_path, left, {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_too_many_is_named(tmp_path, layout):
    tensors = LAYOUTS[layout](weights())
    prefix = "first_stage_model." if layout == "a whole model" else ""
    for more in ("quantize.embedding.weight", "model_ema.encoderconv_inweight"):
        message = refusal(written(tmp_path, {**tensors, prefix + more: np.zeros((2, 2), np.float32)}))
        assert f" hold {prefix + more!r}, which an AutoencoderKL of channels [8, 12, 16] with 2 layers" in message


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [
        ("encoder.conv_in.weight", (8, 3, 1, 3), "[8, 3, 3, 3]"),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", (8, 12, 1, 1), "[12, 8]"),
        ("decoder.up_blocks.0.resnets.2.norm1.bias", (12,), "[16]"),
        ("decoder.up_blocks.0.resnets.2.norm1.bias", (16, 1), "[16]"),
        (f"decoder.{ATTENTION}.to_q.weight", (16, 16, 3, 3), "[16, 16]"),
        ("quant_conv.bias", (), "[8]"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name, shape, right):
    message = refusal(written(tmp_path, {**weights(), name: np.zeros(shape, np.float32)}))
    assert f" hold {name!r} of shape {list(shape)} where " in message
    assert f"config.json asks for {right}; give the file that " in message


@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 3, 3)])
@pytest.mark.parametrize("name", ["encoder.down_blocks.1.resnets.0.conv1.weight", "post_quant_conv.weight"])
def test_a_shape_that_no_size_can_be_taken_from_is_named(tmp_path, inferable, name, shape):
    tensors = {**to_diffusers(inferable[1]), name: np.zeros(shape, np.float32)}
    assert f" hold {name!r} of shape {list(shape)}; give " in refusal(written(tmp_path, tensors, {}))


def test_integers_are_refused(tmp_path):
    tensors = {**weights(), "quant_conv.bias": np.zeros(8, np.int8)}
    assert " hold 'quant_conv.bias' as I8; give a file whose " in refusal(written(tmp_path, tensors))


def test_groups_that_do_not_fit_are_refused(tmp_path):
    """Shapes do not show them: without a config.json they are 32."""
    path = written(tmp_path, weights())
    (tmp_path / "config.json").unlink()
    assert "can't be used: norm_groups=32 does not divide 8 channels; put the config.json " in refusal(path)
    message = refusal(written(tmp_path, weights(), {**metadata("config"), "norm_num_groups": 3}))
    assert "can't be used: norm_groups=3 does not divide 8 channels; mend " in message


def test_a_config_of_another_model_is_refused(tmp_path):
    """The first tensor that it does not go with is named."""
    stated = metadata("config")
    for change in ({"block_out_channels": [8, 12]}, {"layers_per_block": 3}, {"latent_channels": 8}):
        message = refusal(written(tmp_path, weights(), {**stated, **change}))
        assert "give the file that " in message and "config.json belongs to" in message


@pytest.mark.parametrize(
    "knob",
    [
        {"_class_name": "AutoencoderTiny"},
        {"act_fn": "relu"},
        {"in_channels": 1},
        {"shift_factor": 0.1159},
        {"latents_mean": [0.0, 0.0, 0.0, 0.0]},
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
)
def test_what_only_diffusers_can_do_is_refused(tmp_path, knob):
    message = refusal(written(tmp_path, weights(), {**metadata("config"), **knob}))
    ((name, value),) = knob.items()
    assert f"config.json has {name}={value!r}, and only " in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "config.json can't be read ("),
        ("{", "config.json can't be read ("),
        ("[]", "config.json is not a JSON object; mend or remove it."),
        ('{"layers_per_block": "two"}', "config.json.layers_per_block is 'two'; it should be of type int."),
        ('{"layers_per_block": 0}', "config.json.layers_per_block is 0; it should be at least 1."),
        ('{"block_out_channels": 8}', "config.json.block_out_channels is 8; it should be a list."),
        ('{"block_out_channels": [], "norm_num_groups": 4}', "block_channels is empty;"),
        ('{"scaling_factor": 0, "norm_num_groups": 4}', "scaling_factor is 0.0; it should be above 0; mend "),
    ],
)
def test_a_config_that_can_not_be_read_is_named(tmp_path, content, complaint):
    path = written(tmp_path, weights())
    (tmp_path / "config.json").write_text(content)
    assert complaint in refusal(path)


@pytest.mark.parametrize("content", [None, b"", b"not tensors at all"])
def test_a_file_that_can_not_be_read_is_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"The autoencoder's weights {path} can't be read (")
    assert message.endswith("; give the .safetensors file of an AutoencoderKL.")


def test_a_folder_is_not_a_file(tmp_path):
    assert f"{tmp_path} can't be read (" in refusal(tmp_path)


def test_tensors_of_something_else_are_refused(tmp_path):
    message = refusal(written(tmp_path, {"unet.conv_in.weight": np.zeros((2, 2), np.float32)}))
    assert "are not named like an autoencoder's of diffusers or latent-diffusion; give " in message


def test_a_decoder_alone_is_refused(tmp_path):
    """Not taken for a model without scales."""
    tensors = {name: tensor for name, tensor in weights().items() if not name.startswith("encoder.")}
    for named, first in ((tensors, "encoder.down_blocks.0"), (latent_diffusion(tensors), "encoder.down.0")):
        assert f" lack '{first}." in refusal(written(tmp_path, named, {}))
