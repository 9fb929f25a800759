"""Weights that transformers wrote give transformers' answers; what does not fit is refused in a sentence."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from walt_jax.errors import UserError
from walt_jax.text import t5_weights
from walt_jax.text.frozen import FrozenText, padded
from walt_jax.text.t5 import T5Config, T5Encoder
from walt_jax.text.vocabulary import Vocabulary, train

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5"  # see make_t5.py
CONFIG, VOCAB_SIZE = T5Config(dim=12, layers=2, heads=2, head_dim=4, mlp_dim=20), 320
CAPTIONS = ["a red square moving left", "a blue circle moving right", ""]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(train(CAPTIONS, 300))
    return tmp_path / "t5"


def whole(folder):
    """All tensors of the folder, in one file from now on."""
    tensors = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
        file.unlink()
    (folder / t5_weights.INDEX).unlink()
    return tensors


def test_answers_are_those_of_transformers():
    answer = safetensors.numpy.load_file(GOLDEN / "answer.safetensors")
    params = t5_weights.load(GOLDEN, CONFIG, VOCAB_SIZE)
    ids = answer["ids"]
    ours = jax.jit(T5Encoder(CONFIG, VOCAB_SIZE).apply)({"params": params}, ids, ids != 0)
    there = ids != 0
    assert np.abs(answer["output"][there]).max() > 1
    np.testing.assert_allclose(np.asarray(ours)[there], answer["output"][there], atol=1e-5)


def test_one_file_of_a_whole_t5_is_read_as_well_and_matrices_have_the_dtype(folder):
    expected = t5_weights.load(folder, CONFIG, VOCAB_SIZE)
    digest = t5_weights.digest(folder)
    tensors = whole(folder)
    del tensors["shared.weight"]
    decoder = {"decoder.final_layer_norm.weight": np.ones(12, np.float16), "lm_head.weight": np.ones((3, 12))}
    safetensors.numpy.save_file({**tensors, **decoder}, folder / "model.safetensors")
    half = T5Config(12, 2, 2, 4, 20, "bfloat16")
    found = t5_weights.load(folder, half, VOCAB_SIZE)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert other.dtype == (jnp.bfloat16 if one.ndim == 2 else np.float32)
        np.testing.assert_array_equal(one.astype(other.dtype), other)
    # The table's other name is another file to the digest, and so is another tensor; another order is none.
    tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"]
    safetensors.numpy.save_file(dict(reversed(tensors.items())), folder / "model.safetensors")
    assert t5_weights.digest(folder) == digest
    tensors["encoder.block.1.layer.0.layer_norm.weight"] = np.full(12, 2, np.float16)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert t5_weights.digest(folder) != digest


def test_captions_are_read_alike_however_many_are_read_at_once(folder):
    params = t5_weights.load(folder, CONFIG, VOCAB_SIZE)
    vocabulary = Vocabulary.load(t5_weights.vocabulary_path(folder), 12)
    text = FrozenText(T5Encoder(CONFIG, VOCAB_SIZE), params, vocabulary)
    many = text.encode(CAPTIONS * 4)
    ids = vocabulary.encode(CAPTIONS)
    plain = T5Encoder(CONFIG, VOCAB_SIZE).apply({"params": params}, ids, ids != 0)
    for number, caption in enumerate(CAPTIONS):
        single = text.encode([caption])
        (embeddings,) = text.each([caption])
        for field in ("embeddings", "mask"):
            row = getattr(single, field)[0]
            np.testing.assert_array_equal(row, getattr(many, field)[number])
            np.testing.assert_array_equal(row, getattr(many, field)[number + 9])
            np.testing.assert_array_equal(row, getattr(padded([embeddings], 12), field)[0])
        there = ids[number] != 0
        np.testing.assert_array_equal(single.mask[0], there)
        np.testing.assert_allclose(single.embeddings[0][there], plain[number][there], atol=1e-5)
        assert not single.embeddings[0][~there].any()


def test_a_batch_is_read_at_once_and_lists_in_one_shape(folder):
    shapes = []

    class Encoder(T5Encoder):
        def __call__(self, ids, mask):
            jax.debug.callback(lambda ids: shapes.append(ids.shape), ids)
            return super().__call__(ids, mask)

    params = t5_weights.load(folder, CONFIG, VOCAB_SIZE)
    vocabulary = Vocabulary.load(t5_weights.vocabulary_path(folder), 12)
    text = FrozenText(Encoder(CONFIG, VOCAB_SIZE), params, vocabulary)
    batch = text.read(vocabulary.encode(CAPTIONS * 7))
    jax.effects_barrier()
    assert shapes == [(21, 12)]
    rows = text.encode(CAPTIONS * 7)
    jax.effects_barrier()
    assert set(shapes[1:]) == {(8, 12)}
    np.testing.assert_allclose(batch.embeddings, rows.embeddings, atol=1e-5)
    np.testing.assert_array_equal(batch.mask, rows.mask)


@pytest.mark.parametrize(
    ("config", "vocab_size", "words"),
    [
        (T5Config(12, 1, 2, 4, 20), VOCAB_SIZE, ["encoder.block.1.", "layers"]),
        (T5Config(12, 3, 2, 4, 20), VOCAB_SIZE, ["lacks encoder.block.2."]),
        (T5Config(12, 2, 2, 4, 24), VOCAB_SIZE, ["wi_0", "[20, 12]", "[24, 12]", "config.text.encoder"]),
        (CONFIG, 300, ["shared.weight", "[320, 12]", "config.text.vocab_size"]),
    ],
)
def test_another_shape_is_refused(config, vocab_size, words):
    with pytest.raises(UserError) as error:
        t5_weights.load(GOLDEN, config, vocab_size)
    assert all(word in str(error.value) for word in words)


def test_files_that_are_none_are_refused(folder):
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="no T5 that can be read"):
        t5_weights.matched(folder, CONFIG, VOCAB_SIZE)
    (folder / t5_weights.INDEX).write_text(json.dumps({"weights": {}}))
    with pytest.raises(UserError, match="no T5 that can be read"):
        t5_weights.digest(folder)
    with pytest.raises(UserError, match="no T5 that can be read"):
        t5_weights.load(folder / "nowhere", CONFIG, VOCAB_SIZE)


def test_version_1_0_and_whole_numbers_are_refused(folder):
    tensors = whole(folder)
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    safetensors.numpy.save_file({**tensors, name: tensors[name].astype(np.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="as I8"):
        t5_weights.matched(folder, CONFIG, VOCAB_SIZE)
    old = {key.replace("wi_0", "wi"): value for key, value in tensors.items() if "wi_1" not in key}
    safetensors.numpy.save_file(old, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1\.0.*1\.1"):
        t5_weights.matched(folder, CONFIG, VOCAB_SIZE)


def test_one_vocabulary_is_asked_for(folder):
    (folder / "other.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"other\.model and spiece\.model"):
        t5_weights.vocabulary_path(folder)
    for file in folder.glob("*.model"):
        file.unlink()
    with pytest.raises(UserError, match="has no vocabulary"):
        t5_weights.vocabulary_path(folder)
