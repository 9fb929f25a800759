"""Listing folders, for data sets and for raw video."""

import pytest
from etils import epath

from walt_jax.data.listing import read_table, walk
from walt_jax.data.raw import list_raw
from walt_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A tree with links that lead around in circles."""
    for name in ("a.mp4", "b/c.MP4", "b/d.gif", "b/notes.txt", "e/f/g.mp4", ".h/i.mp4", ".j.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/over").symlink_to(tmp_path / "e")
    (tmp_path / "e/back").symlink_to(tmp_path / "b")
    (tmp_path / "e/itself").symlink_to(tmp_path / "e/itself")
    (tmp_path / "e/nowhere").symlink_to(tmp_path / "gone")
    return epath.Path(tmp_path)


# Where a link leads sideways, what is there has another name.
VIDEOS = ["a.mp4", "b/c.MP4", "b/over/f/g.mp4", "e/back/c.MP4", "e/f/g.mp4"]


def test_links_in_circles_end(folder):
    assert walk(folder, (".mp4",)).files == VIDEOS
    videos, again = list_raw(folder)
    assert [video.name for video in videos] == sorted([*VIDEOS, "b/d.gif", "e/back/d.gif"]) and not again
    assert [video.uri for video in videos] == [str(folder / video.name) for video in videos]


def test_a_folders_table_is_the_first_that_is_there(folder):
    assert walk(folder, (".mp4",)).tables == []
    for name in ("metadata.jsonl", "b/metadata.csv", "b/metadata.jsonl"):
        (folder / name).touch()
    (folder / "e/metadata.csv").mkdir()
    tables = walk(folder, (".mp4",)).tables
    assert tables == [
        ("", folder / "metadata.jsonl"),
        ("b/", folder / "b/metadata.csv"),
        ("e/back/", folder / "e/back/metadata.csv"),
    ]


def test_both_kinds_of_table_read_alike(tmp_path):
    table = epath.Path(tmp_path / "metadata.csv")
    table.write_bytes(b'\xef\xbb\xbffile_name,caption\na.mp4,"two\nlines"\n')
    assert read_table(table) == (["file_name", "caption"], [{"file_name": "a.mp4", "caption": "two\nlines"}])
    lines = epath.Path(tmp_path / "metadata.jsonl")
    lines.write_text('{"file_name": "a.mp4", "caption": "two\\nlines"}\n\n')
    assert read_table(lines) == read_table(table)
    table.write_text("file_name,caption\n")
    assert read_table(table) == (["file_name", "caption"], [])
    lines.write_text("")
    assert read_table(lines) == ([], [])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metadata.csv", b"file_name,caption\n\xff,x\n", "is not UTF-8 (byte 18): save it as UTF-8."),
        ("metadata.csv", b"file_name\n" + b"a" * 200_000, "can't be read as CSV (field larger than field limit"),
        ("metadata.jsonl", b"{", "has a line that is no JSON (Expecting"),
        ("metadata.jsonl", b"[]", "has a line that is no JSON object: write one object a line."),
    ],
)
def test_what_is_no_table_is_a_sentence(tmp_path, name, content, sentence):
    table = epath.Path(tmp_path / name)
    table.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(table)
    assert str(error.value).startswith(f"{table} {sentence}")


def test_raw_videos_have_the_captions_of_their_table(folder):
    (folder / "metadata.csv").write_text("file_name,caption\n./a.mp4,one\na.mp4, two \nb/c.MP4,\ngone.mp4,three\n")
    captions = {video.name: video.captions for video in list_raw(folder)[0]}
    assert captions["a.mp4"] == ("one", "two") and captions["b/c.MP4"] == () and captions["gone.mp4"] == ("three",)
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,one\n")
    with pytest.raises(UserError, match="has no columns file_name and caption"):
        list_raw(folder)
