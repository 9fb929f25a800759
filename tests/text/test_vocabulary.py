"""The vocabulary is a function of its captions, reads any prompt, and ends every caption with EOS."""

import pathlib

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.data.drawn import COMBINATIONS
from walt_jax.text.vocabulary import EOS, PAD, Vocabulary, train

CAPTIONS = [combination.caption for combination in COMBINATIONS]
MODEL = train(CAPTIONS, 400)
LENGTH = 12
VOCABULARY = Vocabulary(MODEL, LENGTH)
UNKNOWN = 2
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # lone surrogates are no text


def test_the_same_captions_give_the_same_bytes_in_any_order_and_number():
    assert train(CAPTIONS, 400) == MODEL
    assert train([*reversed(CAPTIONS), *[CAPTIONS[-1]] * 99, "", "  "], 400) == MODEL
    assert train(CAPTIONS[:5], 400) != MODEL


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3))
def test_an_encoded_caption_is_text_then_one_eos_then_padding(captions):
    ids = VOCABULARY.encode(captions)
    assert ids.shape == (len(captions), LENGTH)
    assert ids.dtype == np.int32
    assert ids.max() < VOCABULARY.size
    for row in ids:
        (end,) = np.flatnonzero(row == EOS)
        assert (row[:end] != PAD).all()
        assert (row[end + 1 :] == PAD).all()
        assert UNKNOWN not in row


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_long_captions_are_cut_before_eos(caption):
    whole, short = Vocabulary(MODEL, 500).encode([caption])[0], Vocabulary(MODEL, 4).encode([caption])[0]
    (end,) = np.flatnonzero(whole == EOS)
    assert short.tolist() == [*whole[: min(end, 3)], EOS, *[PAD] * (3 - min(end, 3))]


def test_the_empty_caption_is_eos_alone():
    expected = [EOS] + [PAD] * (LENGTH - 1)
    assert VOCABULARY.encode([""])[0].tolist() == expected
    assert VOCABULARY.encode(["  "])[0].tolist() == expected
    assert Vocabulary(MODEL, 1).encode(["a red circle"])[0].tolist() == [EOS]


@pytest.mark.parametrize("prompt", ["Ein grüner Kreis!", "日本語", "🙂 0123456789", "Жук"])
def test_characters_that_the_captions_lack_are_spelled_in_bytes(prompt):
    decoder = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    ids = Vocabulary(MODEL, 100).encode([prompt])[0]
    pieces = [int(i) for i in ids if i not in (PAD, EOS)]
    assert decoder.decode(pieces) == prompt.casefold()
    assert any(decoder.is_byte(piece) for piece in pieces)


def test_captions_are_distinguished_and_read_back():
    decoder = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    ids = VOCABULARY.encode(CAPTIONS)
    assert len(np.unique(ids, axis=0)) == len(CAPTIONS)
    assert [decoder.decode([int(i) for i in row if i > EOS]) for row in ids] == CAPTIONS


def test_case_is_folded_and_spaces_do_not_count():
    ids = VOCABULARY.encode(["a red circle", "A RED Circle", "  a  red circle "])
    assert (ids == ids[:1]).all()


def test_ids_are_t5s():
    processor = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (PAD, EOS, UNKNOWN, -1)
    assert (PAD, EOS) == (0, 1)


@pytest.mark.parametrize("captions", [[], ["", " "], ["a"], ["🙂"]])
def test_few_captions_are_enough(captions):
    vocabulary = Vocabulary(train(captions, 300), 30)
    assert UNKNOWN not in vocabulary.encode(["a red circle"])


@pytest.mark.parametrize("size", [300, 320, 100_000])
def test_the_size_is_at_most_what_was_asked_for(size):
    assert Vocabulary(train(CAPTIONS, size), 5).size <= size


def test_a_file_is_loaded(tmp_path):
    (tmp_path / "v.model").write_bytes(MODEL)
    loaded = Vocabulary.load(tmp_path / "v.model", LENGTH)
    np.testing.assert_array_equal(loaded.encode(CAPTIONS), VOCABULARY.encode(CAPTIONS))


T5 = pathlib.Path(__file__).parents[3] / "shared" / "data" / "t5" / "cc_all.32000.100extra.model"


@pytest.mark.skipif(not T5.exists(), reason=f"{T5.name} is not there")
def test_a_copy_of_t5s_vocabulary_that_has_a_beginning_gives_the_ids_of_its_embeddings():
    vocabulary = Vocabulary.load(T5, 9)
    known = {
        "Hello, my dog is cute": [8774, 6, 82, 1782, 19, 5295, 1, 0, 0],
        "a cat": [3, 9, 1712, 1, 0, 0, 0, 0, 0],
    }
    assert vocabulary.encode(list(known)).tolist() == list(known.values())
    assert vocabulary.size == 32_100
