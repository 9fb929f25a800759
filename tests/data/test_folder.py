"""A folder as a source: its clips, the held-out ones, samples, and error messages."""

import collections
import dataclasses
import json
import pathlib
import pickle
import string
from concurrent import futures

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from walt_jax.data import clips as clips_lib
from walt_jax.data import store as store_lib
from walt_jax.data import suffixes
from walt_jax.data.clips import StoredClips
from walt_jax.data.folder import Folder
from walt_jax.data.limits import DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.raw import list_raw
from walt_jax.data.shapes import ClipShape
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"

NAMES = [f"clip{i:02}.gif" for i in range(12)]


def write_clip(path, frames=12, height=16, width=24, seed=0):
    """A clip at 10 fps of which no two frames, rows or columns are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (200, 3), np.uint8)
    write_video(path, palette[rng.integers(0, 200, (frames, height, width))], 10)


def write_table(folder, *lines):
    (folder / "metadata.csv").write_text("\n".join(lines), "utf-8")


def source(folder, split="train", frames=5, fps=10, height=12, width=16, **options):
    return StoredClips(Folder(folder, **options), split, [ClipShape(frames, height, width)], fps)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve readable clips without captions."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(NAMES):
        write_clip(folder / name, seed=i)
    return folder


# Which clips


def test_without_a_table_every_video_is_a_clip_without_caption(tmp_path):
    for name in ("b.gif", "a.GIF", "deep/er/c.mp4", ".hidden.gif", ".trash/d.gif"):
        write_clip(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a video")
    train, held_out = source(tmp_path), source(tmp_path, "held_out")
    assert len(train) == 2 and len(held_out) == 1
    assert train.captions + held_out.captions == ["", "", ""]
    assert train.store.skipped == [{"file": "notes.txt", "reason": "no video or image by its name: .txt"}]


def test_with_a_table_its_rows_are_the_clips(tmp_path):
    for name in ("a.gif", "deep/b.gif", "c.gif", "left.gif"):
        write_clip(tmp_path / name)
    write_table(
        tmp_path,
        "\ufefffile_name,license,caption",  # with the byte-order mark of a spreadsheet program
        'deep/b.gif,ours,"a comma, and ""quotes"""',
        "a.gif,ours,  Zürich ",
        "c.gif,ours,",
        "c.gif,ours,the same clip in other words",
    )
    both = source(tmp_path), source(tmp_path, "held_out")
    captions = [caption for part in both for caption in part.captions]
    assert sorted(captions) == sorted(['a comma, and "quotes"', "Zürich", "", "the same clip in other words"])
    assert both[0].store.skipped == [{"file": "left.gif", "reason": "not in metadata.csv"}]
    # Both captions of a file are on the same side.
    assert any({"", "the same clip in other words"} <= set(part.captions) for part in both)


def test_a_split_column_decides(tmp_path):
    rows = {"a.gif": "train", "b.gif": "val", "c.gif": "Test", "d.gif": "train"}
    for name in rows:
        write_clip(tmp_path / name)
    write_table(tmp_path, "file_name,caption,split", *(f"{name},{name},{split}" for name, split in rows.items()))
    assert source(tmp_path).captions == ["a.gif", "d.gif"]
    assert source(tmp_path, "held_out").captions == ["b.gif", "c.gif"]


names = st.sets(st.text(string.ascii_lowercase, min_size=1, max_size=6), min_size=2, max_size=60)


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(names, st.text(string.ascii_lowercase, min_size=1))
@hypothesis.example({"j", "zau", "bbov"}, "a")  # the hash alone would hold out all three
def test_the_split_leaves_no_side_empty_and_does_not_move_files(files, another):
    held_out = clips_lib._held_out(files)
    assert held_out < files and held_out
    more = clips_lib._held_out(files | {another})
    if 1 < len(held_out) < len(files) - 1:  # so no file is there just to keep a side from being empty
        assert held_out <= more | {another} and more <= held_out | {another}


def test_one_in_eight_is_held_out():
    held_out = clips_lib._held_out({f"{i}.mp4" for i in range(4000)})
    assert abs(len(held_out) - 500) < 5 * np.sqrt(4000 * 7 / 64)


def test_the_splits_share_nothing_and_lack_nothing(clips):
    write_table(clips, "file_name,caption", *(f"{name},{name}" for name in NAMES))
    train, held_out = source(clips).captions, source(clips, "held_out").captions
    (clips / "metadata.csv").unlink()
    assert held_out and train and sorted(train + held_out) == NAMES


def test_a_single_clip_is_on_both_sides(tmp_path):
    write_clip(tmp_path / "only.gif")
    assert len(source(tmp_path)) == len(source(tmp_path, "held_out")) == 1


def test_an_unknown_split_is_refused(clips):
    with pytest.raises(ValueError, match="split is 'test'"):
        source(clips, "test")


# Samples


def windows(clip, frames, height, width):
    """Every window and crop of a clip, slowly."""
    return {
        clip[t : t + frames, y : y + height, x : x + width].tobytes()
        for t in range(len(clip) - frames + 1)
        for y in range(clip.shape[1] - height + 1)
        for x in range(clip.shape[2] - width + 1)
    }


def test_samples_are_windows_and_crops_of_the_clip_and_all_of_them_come(tmp_path):
    write_clip(tmp_path / "clip.gif", frames=8, height=16, width=24)
    data = source(tmp_path, frames=5, fps=10, height=16, width=20)
    want = windows(read_clip(tmp_path / "clip.gif", 10), 5, 16, 20)
    rng = np.random.default_rng(0)
    got = [data.sample(0, rng) for _ in range(200)]
    assert all(sample["video"].shape == (5, 16, 20, 3) and sample["video"].dtype == np.uint8 for sample in got)
    assert {sample["video"].tobytes() for sample in got} == want
    assert len(want) == 4 * 5


@pytest.mark.parametrize(("stored", "size"), [((16, 24), (32, 32)), ((40, 24), (12, 16)), ((24, 40), (12, 30))])
def test_a_clip_is_resized_until_it_just_covers_the_crop(tmp_path, stored, size):
    write_clip(tmp_path / "clip.gif", 5, *stored)
    clip = read_clip(tmp_path / "clip.gif", 10, cover=size)
    assert clip.shape[1] == size[0] or clip.shape[2] == size[1]
    video = source(tmp_path, frames=5, height=size[0], width=size[1]).sample(0, np.random.default_rng(0))["video"]
    assert video.tobytes() in windows(clip, 5, *size)


def test_the_same_rng_gives_the_same_bytes(clips):
    first, second = (
        [data.sample(i, np.random.default_rng(i))["video"].tobytes() for i in range(len(data))]
        for data in (source(clips), source(clips, cache_bytes=0))  # with the cache, and without
    )
    assert first == second


def test_writing_into_a_sample_changes_no_other(clips):
    data = source(clips)
    before = data.sample(0, np.random.default_rng(0))["video"].copy()
    data.sample(0, np.random.default_rng(0))["video"][:] = 0
    np.testing.assert_array_equal(data.sample(0, np.random.default_rng(0))["video"], before)


def test_the_cache_keeps_within_its_bytes_and_spares_decoding(clips, monkeypatch):
    data = source(clips)
    decoded = []
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: decoded.append(args[1]) or read(*args))
    one = 12 * 12 * 18 * 3
    for limit, want in ((one * 100, len(data)), (one * 4, 3 * len(data) - 8), (0, 3 * len(data))):
        data.store._cache = store_lib._Cache(limit)
        decoded.clear()
        for _ in range(3):
            for i in range(len(data)):
                data.sample(i, np.random.default_rng(0))
                assert data.store._cache.bytes <= limit
                assert data.store._cache.bytes == sum(array.nbytes for array in data.store._cache._arrays.values())
        assert len(decoded) == want
        assert data.store._cache.bytes == min(one * len(data), limit)


def test_the_cache_keeps_what_came_first():
    cache = store_lib._Cache(100)
    for key in ("a", "b", "a", "c", "d"):
        cache.put(key, np.zeros(30, np.uint8))
    cache.put("too large", np.zeros(101, np.uint8))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "b", "c"]
    assert cache.bytes == 90 and cache.has_room(10) and not cache.has_room(11)


@pytest.mark.parametrize("promised", [5, 11, 12, 13, 40])
def test_what_is_kept_and_what_is_decoded_anew_are_the_same_whatever_the_header_says(tmp_path, promised):
    write_clip(tmp_path / "clip.gif", frames=12)
    samples = []
    for cache_bytes in (2**30, 0):
        folder = Folder(tmp_path, cache_bytes=cache_bytes)
        folder.info["clip.gif"] = dataclasses.replace(folder.info["clip.gif"], seconds=promised / 10)
        data = StoredClips(folder, "train", [ClipShape(5, 12, 16)], 10)
        samples.append([data.sample(0, np.random.default_rng(i))["video"].tobytes() for i in range(20)])
        assert bool(folder._cache.bytes) == bool(cache_bytes)
    assert samples[0] == samples[1]


def test_of_a_long_clip_only_windows_are_decoded_and_they_are_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "long.mp4", rng.integers(0, 256, (60, 16, 16, 3), np.uint8), 10)
    want = windows(read_clip(tmp_path / "long.mp4", 10), 5, 16, 16)
    monkeypatch.setattr(store_lib, "WHOLE_CLIP_BYTES", 30 * 16 * 16 * 3)
    data = source(tmp_path, height=16, width=16)
    got = {data.sample(0, rng)["video"].tobytes() for _ in range(40)}
    assert got <= want and len(got) > 20
    assert data.store._cache.bytes == 0


def test_a_header_that_promises_too_much_is_found_out(tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.gif", frames=8)
    monkeypatch.setattr(store_lib, "WHOLE_CLIP_BYTES", 0)
    folder = Folder(tmp_path)
    folder.info["clip.gif"] = dataclasses.replace(folder.info["clip.gif"], seconds=60.0, frames=600)
    data = StoredClips(folder, "train", [ClipShape(5, 16, 24)], 10)
    want = windows(read_clip(tmp_path / "clip.gif", 10), 5, 16, 24)
    assert all(data.sample(0, np.random.default_rng(i))["video"].tobytes() in want for i in range(10))
    with pytest.raises(UserError, match="too short: 8 of 9 frames"):
        StoredClips(folder, "train", [ClipShape(9, 16, 24)], 10)


# Shapes


def test_a_side_keeps_the_aspect_ratio(tmp_path):
    for name, (height, width) in {"wide": (36, 64), "tall": (64, 36), "square": (40, 40), "strip": (16, 160)}.items():
        write_clip(tmp_path / f"{name}.gif", 5, height, width)
    folder = Folder(tmp_path)
    data = [StoredClips(folder, split, [ClipShape(5, side=32, unit=(8, 8))], 10) for split in ("train", "held_out")]
    sizes = {}
    for part in data:
        for index in range(len(part)):
            sizes[part.file(index)] = part.sample(index, np.random.default_rng(0))["video"].shape[1:3]
    assert sizes == {"wide.gif": (24, 40), "tall.gif": (40, 24), "square.gif": (32, 32), "strip.gif": (16, 56)}


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(8, 512),
    st.sampled_from([(1, 1), (8, 8), (8, 16), (16, 16)]),
)
def test_a_sides_sizes_are_whole_units_of_about_its_pixels(height, width, side, unit):
    shape = ClipShape(1, side=side, unit=unit)
    rows, columns = shape.size(height, width)
    assert rows % unit[0] == columns % unit[1] == 0
    if side >= 8 * max(unit):
        assert 0.75 < rows * columns / side**2 < 1.35
        aspect = min(max(height / width, 1 / 3), 3)
        assert 0.8 < rows / columns / aspect < 1.25


def test_sizes_lists_all_sizes_of_a_side():
    shape = ClipShape(1, side=96, unit=(16, 16))
    sizes = shape.sizes()
    assert {shape.size(h, w) for h in range(1, 200, 7) for w in range(1, 200, 7)} <= sizes
    assert (96, 96) in sizes and len(sizes) < 30


def test_a_stride_takes_every_other_frame(tmp_path):
    write_clip(tmp_path / "clip.gif", frames=9, height=16, width=16)
    clip = read_clip(tmp_path / "clip.gif", 10)
    video = StoredClips(Folder(tmp_path), "train", [ClipShape(5, 16, 16, stride=2)], 10).sample(
        0, np.random.default_rng(0)
    )["video"]
    np.testing.assert_array_equal(video, clip[::2])
    with pytest.raises(UserError, match="too short: 9 of 11 frames"):
        StoredClips(Folder(tmp_path), "train", [ClipShape(6, 16, 16, stride=2)], 10)


def test_shapes_come_by_their_weights_and_short_clips_get_one_that_they_have(tmp_path):
    write_table(tmp_path, "file_name,caption,split", "long.gif,,train", "still.png,,train")
    write_clip(tmp_path / "long.gif", frames=12, height=16, width=16)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "still.png")
    data = StoredClips(Folder(tmp_path), "train", [ClipShape(5, 8, 8, weight=3.0), ClipShape(1, 16, 16)], 10)
    rng = np.random.default_rng(0)
    taken = [data.sample(0, rng) for _ in range(200)]
    assert abs(sum(clip["shape"] == 0 for clip in taken) - 150) < 4 * np.sqrt(200 * 3 / 16)
    assert all(clip["video"].shape == ((5, 8, 8, 3), (1, 16, 16, 3))[clip["shape"]] for clip in taken)
    assert {data.sample(1, rng)["shape"] for _ in range(20)} == {1}
    assert data.store.skipped == []


# Captions and tables


def test_captions_come_by_their_weights_and_never_empty(tmp_path):
    write_table(tmp_path, "file_name,long,short", "a.gif,a long one,short", "b.gif,,alone")
    for name in ("a.gif", "b.gif"):
        write_clip(tmp_path / name)
    parts = [source(tmp_path, split, captions={"long": 0.95, "short": 0.05}) for split in ("train", "held_out")]
    rng, seen = np.random.default_rng(0), collections.Counter()
    for part in parts:
        assert len(part) == 1
        seen.update(part.sample(0, rng)["caption"] for _ in range(400))
    assert seen["alone"] == 400
    assert abs(seen["short"] - 20) < 4 * np.sqrt(19) and seen["short"] + seen["a long one"] == 400
    assert sorted(caption for part in parts for caption in part.captions) == ["a long one", "alone", "short"]


def test_a_jsonl_table_and_tables_of_sub_folders(tmp_path):
    for name in ("x/a.gif", "x/b.gif", "y/c.gif", "y/left.gif"):
        write_clip(tmp_path / name)
    rows = [{"file_name": "a.gif", "caption": "ä"}, {"file_name": "b.gif", "caption": None}]
    (tmp_path / "x" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_table(tmp_path / "y", "file_name,caption", "c.gif,sea")
    parts = source(tmp_path), source(tmp_path, "held_out")
    assert sorted(caption for part in parts for caption in part.captions) == ["", "sea", "ä"]
    assert parts[0].store.skipped == [{"file": "y/left.gif", "reason": "not in metadata.csv"}]


def test_links_in_a_circle_and_folders_named_like_files(tmp_path):
    write_clip(tmp_path / "deep" / "a.gif")
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    (tmp_path / "b.mp4").mkdir()
    write_clip(tmp_path / "line\nbreak.gif")
    data = source(tmp_path, max_bad_fraction=0.5)
    assert data.store.skipped == [{"file": "b.mp4", "reason": "a folder, not a file"}]
    assert {row.file for row in data.store.rows} == {"deep/a.gif", "line\nbreak.gif"}


def test_threads_read_what_one_thread_reads(clips):
    data = source(clips, cache_bytes=40_000)

    def sample(i):
        return data.sample(i % len(data), np.random.default_rng(i))["video"].tobytes()

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sample, range(200))) == [sample(i) for i in range(200)]


def test_a_copy_goes_to_another_process(clips):
    data = source(clips)
    data.sample(0, np.random.default_rng(0))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.store._cache.bytes == 0
    np.testing.assert_array_equal(
        copy.sample(0, np.random.default_rng(0))["video"], data.sample(0, np.random.default_rng(0))["video"]
    )


# Clips that can't be used


def test_short_clips_are_skipped_and_count_as_good(tmp_path):
    write_table(tmp_path, "file_name,caption,split", "a.gif,,train", "short.gif,,train", "still.gif,,train")
    write_clip(tmp_path / "a.gif")
    write_clip(tmp_path / "short.gif", frames=4)
    write_clip(tmp_path / "still.gif", frames=1)
    data = source(tmp_path, frames=5)
    rng = np.random.default_rng(0)
    assert [data.sample(i, rng) is None for i in (0, 1, 2, 1)] == [False, True, True, True]
    assert data.sample(1, np.random.default_rng(0)) is None
    assert data.store.skipped == [
        {"file": "short.gif", "reason": "too short: 4 of 5 frames at 10 fps"},
        {"file": "still.gif", "reason": "too short: 1 of 5 frames at 10 fps"},
    ]


def test_a_file_that_breaks_later_is_skipped_until_none_is_left(tmp_path):
    write_table(tmp_path, "file_name,caption,split", "a.gif,,train", "b.gif,,train")
    for name in ("a.gif", "b.gif"):
        write_clip(tmp_path / name)
    data = source(tmp_path, cache_bytes=0, max_bad_fraction=1.0)
    (tmp_path / "b.gif").write_bytes(b"")
    assert data.sample(1, np.random.default_rng(0)) is None and data.sample(0, np.random.default_rng(0)) is not None
    assert data.store.skipped == [{"file": "b.gif", "reason": "empty file"}]
    (tmp_path / "a.gif").unlink()
    with pytest.raises(UserError, match=r"train split gives 5 frames at 10 fps; a\.gif, for one, does not"):
        data.sample(0, np.random.default_rng(0))


def test_bad_files_up_to_a_fraction(tmp_path):
    for name in NAMES[:8]:
        write_clip(tmp_path / name)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_text("<html>" * 20)
    with pytest.raises(UserError) as error:
        source(tmp_path, max_bad_fraction=0.19)
    assert str(error.value) == (
        f"2 of 10 files in {tmp_path} can't be read, the first being empty.mp4 (empty file): remove them, or raise "
        "--config.data.max_bad_fraction, now 0.19, to 0.2."
    )
    train, held_out = (source(tmp_path, split, max_bad_fraction=0.2) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 8
    assert [entry["file"] for entry in train.store.skipped] == ["empty.mp4", "page.mp4"]
    (tmp_path / "page.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 9 files .*: remove it, or raise"):
        source(tmp_path)


# Mistakes of the user


@pytest.mark.parametrize(
    ("table", "files", "sentence"),
    [
        (
            None,
            [],
            "{folder} holds no video and no image: put files in it that end in .mp4, .m4v, .mov, .webm, ",
        ),
        ("", [], "{folder}/metadata.csv names no clip: "),
        ("file_name,caption\n", ["a.gif"], "{folder}/metadata.csv names no clip: "),
        ("file_name,text\na.gif,x\n", ["a.gif"], "{folder}/metadata.csv has no column caption: "),
        ("path,caption\na.gif,x\n", ["a.gif"], "{folder}/metadata.csv has no column file_name: "),
        ("file_name,caption\n,x\n", ["a.gif"], "{folder}/metadata.csv has a row without a file_name ('x'): "),
        ("file_name,caption\nb.gif,x\n", ["a.gif"], "{folder}/metadata.csv names b.gif, which is not there: "),
        ("file_name,caption\n\xff,x\n", ["a.gif"], "{folder}/metadata.csv is not UTF-8 (byte 18): "),
        (
            "file_name,caption,split\na.gif,x,dev\n",
            ["a.gif"],
            "{folder}/metadata.csv puts a.gif in the split 'dev': write one of train, val, validation, test.",
        ),
        ("file_name,caption,split\na.gif,x\n", ["a.gif"], "{folder}/metadata.csv puts a.gif in the split '': "),
        (
            "file_name,caption,split\na.gif,x,test\n",
            ["a.gif"],
            "no readable clip in {folder} belongs to the train split: ",
        ),
        (
            None,
            ["short.gif"],
            "no clip of {folder}'s train split gives 5 frames at 10 fps; short.gif, for one, does not (too short: 4 of "
            "5 frames at 10 fps): use longer clips, or ask for fewer frames or more frames per second.",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, table, files, sentence):
    for name in files:
        write_clip(tmp_path / name, frames=4 if name == "short.gif" else 12)
    if table is not None:
        (tmp_path / "metadata.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(UserError) as error:
        source(tmp_path)
    assert str(error.value).startswith(sentence.format(folder=tmp_path))
    assert str(error.value).endswith(".") and ". " not in str(error.value) and "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no data folder .*/nowhere: correct its path, or create it\."):
        source(tmp_path / "nowhere")


# Real files


def test_real_clips():
    if not (SHARED / "actions").is_dir():
        pytest.skip(f"no {SHARED / 'actions'} on this machine")
    data = source(SHARED / "actions", "held_out", frames=17, fps=8, height=32, width=56)
    assert 1 <= len(data) <= 14 and all(data.captions)
    assert data.sample(0, np.random.default_rng(0))["video"].shape == (17, 32, 56, 3)
    assert data.store.skipped == []


def test_real_bad_files():
    if not (SHARED / "bad").is_dir():
        pytest.skip(f"no {SHARED / 'bad'} on this machine")
    with pytest.raises(UserError, match=r"13 of 40 files .* first being audio_only\.mp4 \(no video stream\)"):
        source(SHARED / "bad", frames=1)
    data = source(SHARED / "bad", frames=1, max_bad_fraction=0.5)
    videos = [data.sample(i, np.random.default_rng(0)) for i in range(0, len(data), 6)]
    assert all(sample["video"].shape == (1, 12, 16, 3) for sample in videos)


# What a folder may have that is no clip


def test_all_modes_and_the_docs_have_one_list_of_suffixes(tmp_path):
    assert {".3gp", ".wmv", ".asf", ".mpg", ".flv", ".ogv", ".m4v", ".ts"} <= set(suffixes.VIDEO_SUFFIXES)
    text = (pathlib.Path(__file__).parents[2] / "docs/data.md").read_text()
    listed = [line for line in text.splitlines() if line.startswith("Suffixes")]
    assert set(" ".join(listed).replace("`", "").replace(",", "").split()) >= set(suffixes.SUFFIXES)
    for suffix in suffixes.VIDEO_SUFFIXES:
        (tmp_path / f"a{suffix}").write_text("")
    assert (
        len(list_raw(tmp_path)[0])
        == len(Folder(tmp_path, max_bad_fraction=1.0).skipped)
        == len(suffixes.VIDEO_SUFFIXES)
    )


def test_small_ones_are_left_out_and_stop_nothing(tmp_path):
    write_clip(tmp_path / "good.gif")
    Image.fromarray(np.zeros((15, 40, 3), np.uint8)).save(tmp_path / "icon.png")
    folder = Folder(tmp_path)
    assert [row.file for row in folder.rows] == ["good.gif"]
    assert folder.skipped[0]["reason"].startswith("too small: 40 x 15 pixels, where a side must have 16")
    assert len(Folder(tmp_path, limits=DecodeLimits(shortest_side=15)).rows) == 2


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ["file_name,caption", "a.gif,a dog, running"],
            r"has 3 fields in line 2, .* put a text with a comma in quotes",
        ),
        (["file_name;caption", "a.gif;a dog"], r"is separated by semicolons: save it with commas"),
    ],
)
def test_a_table_that_would_lose_captions_says_so(tmp_path, lines, sentence):
    write_clip(tmp_path / "a.gif")
    write_table(tmp_path, *lines)
    with pytest.raises(UserError, match=sentence):
        Folder(tmp_path)


def test_a_file_is_not_a_folder(tmp_path):
    write_clip(tmp_path / "a.gif")
    with pytest.raises(UserError, match=f"a.gif is a file; name the folder that it is in: .*{tmp_path}"):
        Folder(tmp_path / "a.gif")


def test_pictures_where_clips_are_asked_for_say_how_to_take_them(tmp_path):
    for index in range(2):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match=r"images, .* set --config\.data\.frames=1"):
        source(tmp_path)


def test_a_table_in_a_sub_folder_that_leaves_most_files_out_is_a_warning(tmp_path):
    for index in range(12):
        write_clip(tmp_path / (f"sub/{index}.gif" if index < 3 else f"{index}.gif"), frames=2)
    write_table(tmp_path / "sub", "file_name,caption", *(f"{index}.gif,a" for index in range(3)))
    (warning,) = Folder(tmp_path).warnings
    assert warning.startswith(f"9 of 12 files in {tmp_path} are left out, as no table names them")


def test_without_refusing_problems_are_listed_and_every_file_is_kept_or_skipped(tmp_path):
    for name in ("a.gif", "b.gif"):
        write_clip(tmp_path / name)
    (tmp_path / "bad.mp4").write_text("<html>")
    (tmp_path / "odd.xyz").write_text("")
    write_table(tmp_path, "file_name;caption", "a.gif;b")
    folder = Folder(tmp_path, refuse=False)
    assert ["semicolons" in problem for problem in folder.problems] == [True, False]
    assert folder.problems[1].startswith("1 of 3 files")
    assert {row.file for row in folder.rows} | set(folder.reasons) == {"a.gif", "b.gif", "bad.mp4", "odd.xyz"}
