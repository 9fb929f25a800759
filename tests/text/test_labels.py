"""Labels are places in a list, kept in a file; what is no label is named, and so is a damaged file."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.errors import UserError
from walt_jax.text.labels import Labels

NAMES = ["cat", "a dog", "Cat", "東京", '"quoted"\n']


def test_a_name_is_its_place_and_the_empty_name_comes_after_all():
    ids = Labels(NAMES).encode(["a dog", "", "cat", "東京", "Cat", "a dog"])
    np.testing.assert_array_equal(ids, [[1], [5], [0], [3], [2], [1]])
    assert ids.dtype == np.int32


def test_no_captions_are_no_rows():
    assert Labels(NAMES).encode([]).shape == (0, 1)
    assert Labels([]).encode([]).shape == (0, 1)


def test_without_names_whatever_is_asked_for_is_0():
    ids = Labels([]).encode(["cat", "", "anything"])
    np.testing.assert_array_equal(ids, np.zeros((3, 1)))
    assert ids.dtype == np.int32


def test_an_unknown_name_is_refused_with_some_of_the_names():
    with pytest.raises(UserError, match=r"'bird' is not one of the 5 classes of this run \(cat, a dog, Cat, 東京"):
        Labels(NAMES).encode(["cat", "bird"])
    many = Labels([f"class {number}" for number in range(300)])
    with pytest.raises(UserError, match=r"'cat' is not one of the 300 classes .*class 7, …\)") as caught:
        many.encode(["cat"])
    assert "class 8" not in str(caught.value)
    with pytest.raises(UserError, match=r"classes of this run \(one\)"):
        Labels(["one"]).encode([" one"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True))
def test_a_list_that_is_written_reads_the_same(names):
    content = Labels(names).dump()
    assert Labels(json.loads(content.decode("utf-8"))).names == tuple(names)
    assert content.endswith(b"\n")


def test_from_a_file(tmp_path):
    path = tmp_path / "labels.json"
    path.write_bytes(Labels(NAMES).dump())
    again = Labels.load(path)
    assert again.names == tuple(NAMES)
    np.testing.assert_array_equal(again.encode(NAMES), Labels(NAMES).encode(NAMES))
    assert "東京" in path.read_text(encoding="utf-8")  # to be read by people, too


@pytest.mark.parametrize("content", [None, b"", b'["cat", ', b"\xff\xfe", b"3", b'{"cat": 0}'], ids=str)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"labels\.json can't be read .*; restore it, or start in another --workdir"):
        Labels.load(path)
