"""DiT and Latte with published weights answer what diffusers answers, and go back to the same files.

`tests/golden/make_published.py` makes the files and says what is in them.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from walt_jax.denoiser.dit_block import DiTConfig
from walt_jax.denoiser.latte_block import LatteConfig
from walt_jax.denoiser.layout import Layout, from_tokens, to_tokens
from walt_jax.denoiser.model import Condition, Denoiser
from walt_jax.denoiser.published_weights import export, load
from walt_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SIZES = {"dim": 24, "heads": 2, "patch_size": (1, 2, 2)}
DIT = DiTConfig(**SIZES, layers=2, windows=((None, None, None),), cross_attention=False, classes=5)
CLOSED = dataclasses.replace(DIT, time_frequencies="diffusers")
LATTE = LatteConfig(**SIZES, layers=4, windows=((1, None, None), (None, 1, 1)))
CASES = {
    "dit": CLOSED,
    "dit_each": dataclasses.replace(CLOSED, embedders_per_block=True),
    "dit_original": DIT,
    "latte": LATTE,
}


def golden(name, folder):
    """(weights alone, as a file; inputs and output)."""
    tensors = load_file(GOLDEN / f"published_{name}.safetensors")
    rest = {key: tensors.pop(key) for key in list(tensors) if key.startswith("input.") or key == "output"}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path, tensors, rest


def inputs(config, rest):
    clips = rest["input.video" if "input.video" in rest else "input.image"]
    clips = np.moveaxis(clips.reshape(*clips.shape[:2], -1, *clips.shape[-2:]), 1, -1)
    condition = Condition()
    if config.classes:
        condition = Condition(label=rest["input.labels"][:, None])
    if config.cross_attention:
        text = rest["input.text"][:, None]
        condition = Condition(text=text, text_mask=np.ones(text.shape[:-1], bool))
    # Their first step's time is 0, ours is a thousandth.
    time = ((rest["input.steps"] + 1) / 1000).astype(np.float32)[:, None]
    grid = config.grid(clips.shape[1:4])
    return to_tokens(clips, config.patch_size), time, condition, Layout(grid=grid)


def like(config, values):
    model = Denoiser(config, values[-1].grid)
    return model, jax.tree.map(
        lambda leaf: leaf.unbox(), jax.eval_shape(model.init, jax.random.key(0), *values)["params"], is_leaf=is_box
    )


def is_box(leaf):
    return hasattr(leaf, "unbox")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_theirs(name, scan, tmp_path):
    if scan and name == "dit_each":
        pytest.skip("its first block differs from the others")
    config = dataclasses.replace(CASES[name], scan=scan)
    path, _, rest = golden(name, tmp_path)
    values = inputs(config, rest)
    model, shapes = like(config, values)
    params = load(path, config, shapes)
    out = np.asarray(jax.jit(model.apply)({"params": params}, *values))
    # The prediction and v, of each the channels of a clip.
    halves = [from_tokens(half, values[-1].grid, config.patch_size) for half in np.split(out, 2, axis=-1)]
    ours = np.moveaxis(np.concatenate(halves, axis=-1), -1, 1).reshape(rest["output"].shape)
    error = np.abs(ours - rest["output"]).max() / np.abs(rest["output"]).max()
    assert error < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_back_they_are_the_same_tensors(name, tmp_path):
    config = CASES[name]
    path, tensors, rest = golden(name, tmp_path)
    params = load(path, config, like(config, inputs(config, rest))[1])
    back = export(params, config, diffusers=name != "dit_original")
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_allclose(back[key], tensor, rtol=1e-6, atol=1e-6)


def refused(tmp_path, config, tensors):
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    _, _, rest = golden("dit", tmp_path)
    with pytest.raises(UserError) as caught:
        load(path, config, like(config, inputs(config, rest))[1])
    return str(caught.value)


def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    _, tensors, rest = golden("dit", tmp_path)
    assert "lacks proj_out_2.bias" in refused(
        tmp_path, CLOSED, {key: value for key, value in tensors.items() if key != "proj_out_2.bias"}
    )
    assert "has more.weight, which this config has no place for" in refused(
        tmp_path, CLOSED, {**tensors, "more.weight": np.zeros(3)}
    )
    assert "proj_out_2.bias of shape (5,) does not fit patch_out/bias" in refused(
        tmp_path, CLOSED, {**tensors, "proj_out_2.bias": np.zeros(5, np.float32)}
    )
    assert "time_frequencies='diffusers', not 'original'" in refused(tmp_path, DIT, tensors)
    assert "has nothing for relative" not in refused(tmp_path, dataclasses.replace(CLOSED, layers=3), tensors)
    assert "has nothing for cycle0/block0/self_attention/key_norm/scale" in refused(
        tmp_path, dataclasses.replace(CLOSED, qk_norm=True), tensors
    )
    copy = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    assert f"{copy} differs from transformer_blocks.0" in refused(
        tmp_path, CLOSED, {**tensors, copy: 1 + tensors[copy]}
    )
    (tmp_path / "no.safetensors").write_text("<html>")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        load(tmp_path / "no.safetensors", CLOSED, like(CLOSED, inputs(CLOSED, rest))[1])


@pytest.mark.parametrize("tubelets", ["central", "average"])
def test_of_a_still_clip_tubelets_answer_as_the_image_does(tubelets, tmp_path):
    """Patches of two frames of a clip whose frames are alike, and so are all frames of the answer."""
    path, _, rest = golden("dit", tmp_path)
    tokens, time, condition, layout = inputs(CLOSED, rest)
    video = dataclasses.replace(CLOSED, patch_size=(2, 2, 2))
    image = from_tokens(tokens, layout.grid, CLOSED.patch_size)
    still = np.repeat(image, 2, axis=1)
    values = to_tokens(still, video.patch_size), time, condition, layout
    model, shapes = like(video, values)
    params = load(path, video, shapes, tubelets)
    kernel = params["patch_in"]["kernel"].reshape(2, -1, video.dim)
    if tubelets == "central":
        assert not kernel[0].any() and kernel[1].any()
    else:
        np.testing.assert_array_equal(kernel[0], kernel[1])
    out = np.asarray(jax.jit(model.apply)({"params": params}, *values))
    parts = [from_tokens(half, layout.grid, video.patch_size) for half in np.split(out, 2, axis=-1)]
    answer = np.concatenate(parts, axis=-1)
    np.testing.assert_array_equal(answer[:, 0], answer[:, 1])
    expected = np.moveaxis(rest["output"], 1, -1)
    assert np.abs(answer[:, 0] - expected).max() / np.abs(expected).max() < 1e-5
    with pytest.raises(UserError, match="patches of one frame"):
        export(params, video)
