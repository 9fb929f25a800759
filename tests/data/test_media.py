"""Written videos and sheets can be read back, are equal for equal frames, and are complete."""

import os
import signal

import numpy as np
import pytest
from PIL import Image, ImageDraw

from walt_jax.data import media
from walt_jax.data.media import compare_sheet, contact_sheet, write_video, write_video_stream
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError


def moving(frames=17, height=48, width=64):
    """A bright disc on a smooth background, moving to the right."""
    t, y, x = np.ogrid[:frames, :height, :width]
    disc = (x - 3 * t - 10) ** 2 + (y - height / 2) ** 2 < 80
    background = np.stack(np.broadcast_arrays(2 * y + 0 * t + 0 * x, x + 0 * t + 0 * y, 60 + 0 * (t + x + y)), -1)
    return np.where(disc[..., None], (250, 240, 230), background).astype(np.uint8)


def error(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize(("suffix", "limit"), [(".mp4", 2.0), (".gif", 2.0), (".MP4", 2.0)])
@pytest.mark.parametrize("fps", [8, 23.976, 25, 30])
def test_a_clip_reads_back(tmp_path, suffix, limit, fps):
    clip = moving()
    write_video(tmp_path / f"clip{suffix}", clip, fps)
    again = read_clip(tmp_path / f"clip{suffix}", fps)
    assert again.shape == clip.shape
    assert max(error(a, b) for a, b in zip(clip, again, strict=True)) < limit


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_equal_frames_give_equal_bytes(tmp_path, suffix):
    # 112 is a width at which x264 with its default settings gives other bytes now and then.
    clip = moving(width=112) // 8 * np.random.default_rng(0).integers(1, 8, (17, 48, 112, 1), np.uint8)
    contents = set()
    for i in range(6):
        write_video(tmp_path / f"{i}{suffix}", clip, 8)
        contents.add((tmp_path / f"{i}{suffix}").read_bytes())
        read_clip(tmp_path / f"{i}{suffix}")  # moves memory about
    assert len(contents) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 32), (32, 17)])
def test_odd_sides_grow_by_a_repeated_line_in_mp4_only(tmp_path, size):
    height, width = size
    clip = moving(2, 32, 32)[:, :height, :width]
    write_video(tmp_path / "clip.gif", clip, 8)
    assert read_clip(tmp_path / "clip.gif", 8).shape == clip.shape
    write_video(tmp_path / "clip.mp4", clip, 8)
    again = read_clip(tmp_path / "clip.mp4")
    assert again.shape == (2, height + height % 2, width + width % 2, 3)
    assert error(again[:, -1], np.broadcast_to(again[:, height - 1], again[:, -1].shape)) < 4


def test_mp4_starts_playing_before_it_is_all_there(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(), 8)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_gif_keeps_few_colours_exactly_loops_and_keeps_time(tmp_path):
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (100, 3), np.uint8)
    clip = palette[rng.integers(0, 100, (30, 16, 16))]
    write_video(tmp_path / "clip.gif", clip, 30)
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.gif"), clip)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["loop"] == 0
        milliseconds = 0
        for i in range(30):
            image.seek(i)
            milliseconds += image.info["duration"]
    assert milliseconds == 1000


def test_one_frame_is_a_clip(tmp_path):
    for suffix in (".mp4", ".gif"):
        write_video(tmp_path / f"clip{suffix}", moving(1), 8)
        assert len(read_clip(tmp_path / f"clip{suffix}", 8)) == 1


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"clip\.png can't be written as video: give it a name that ends in \.mp4 or"):
        write_video(tmp_path / "clip.png", moving(), 8)


def test_contact_sheet_shows_stills_over_all_of_the_time_enlarged():
    clip = np.stack([np.full((16, 24, 3), 10 * i, np.uint8) for i in range(21)])
    sheet = np.asarray(contact_sheet([clip], ["a caption"], frames_per_clip=5, scale=2))
    # The middle of each still: 48 pixels wide, 2 apart, 8 from the margin.
    assert [sheet[24, 8 + 24 + 50 * i, 0] for i in range(5)] == [0, 50, 100, 150, 200]
    assert (sheet[41:] < 100).any(), "no caption"
    assert (sheet[:, -8:] == 255).all() and (sheet[-4:] == 255).all(), "no margin"


def test_contact_sheet_takes_any_clips_and_any_captions():
    clips = [moving(17), moving(1), moving(3, 20, 90), moving(5, 200, 100)]
    captions = ["", "word " * 200, "x" * 1000, "un été à Zürich …"]
    short = contact_sheet(clips, captions, columns=2)
    long = contact_sheet(clips, captions, columns=1)
    assert short.width > 1.9 * (long.width - 20) and short.height < long.height
    # However long its caption, no cell's text goes past the next cell's start.
    assert long.height < contact_sheet(clips, ["a"] * 4, columns=1).height + 2 * 2 * 19 + 4 * 19


def test_captions_are_wrapped_and_cut_off_with_an_ellipsis(monkeypatch):
    drawn, draw = [], ImageDraw.ImageDraw.multiline_text

    def recorded(self, xy, text, *args, **kwargs):
        drawn.append(text)
        draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", recorded)
    words = [f"word{i}" for i in range(200)]
    for count in (1, 15, 200):
        contact_sheet([moving(5, 96, 96)], [" ".join(words[:count])], columns=1)
    short, wrapped, cut = drawn
    assert short == "word0"
    assert wrapped.split() == words[:15] and 1 <= wrapped.count("\n") <= 2
    assert cut.endswith("…") and cut.count("\n") == 2
    shown = cut.removesuffix("…").split()
    assert shown[:-1] == words[: len(shown) - 1]  # of the last one, some letters may be gone


def test_compare_sheet_lines_up_what_is_compared():
    a, b = np.full((9, 32, 32, 3), 50, np.uint8), np.full((9, 32, 32, 3), 200, np.uint8)
    sheet = np.asarray(compare_sheet([("one", [("original", a), ("its reconstruction", b)]), ("two", [("x", a)])]))
    columns = [np.flatnonzero((sheet == level).all(-1).any(0)) for level in (50, 200)]
    # Glyphs are antialiased, so some of their pixels may have either level; stills are 96 wide.
    assert columns[0].max() == columns[1].max()
    assert (sheet == 50).all(-1).sum() >= 2 * 5 * 96 * 96
    assert (sheet == 200).all(-1).sum() >= 5 * 96 * 96


@pytest.fixture
def raising():
    """SIGTERM raises, as it does in a program that `stop_at_once` was called for."""

    def handle(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    yield handle
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("made", [0, 1, 5])
def test_a_stream_that_is_stopped_leaves_its_frames_or_no_file(tmp_path, raising, made):
    clip = moving()

    def frames():
        yield from clip[:made]
        assert media.unfinished() == (made > 0)
        os.kill(os.getpid(), signal.SIGTERM)
        yield clip[made]

    with pytest.raises(KeyboardInterrupt):
        write_video_stream(tmp_path / "clip.mp4", frames(), 8, keeps_part=True)
    assert signal.getsignal(signal.SIGTERM) is raising and not media.unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"] * (made > 0)
    if made:
        again = read_clip(tmp_path / "clip.mp4")
        assert len(again) == made and error(again, clip[:made]) < 2


def test_a_frame_that_is_being_written_is_not_torn_by_a_signal(tmp_path, raising, monkeypatch):
    """The signal comes in the middle of encoding the third frame: it is written, and no further one is made."""
    clip, pad, padded = moving(), np.pad, []

    def spy(*arguments, **more):
        padded.append(1)
        if len(padded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return pad(*arguments, **more)

    monkeypatch.setattr(media.np, "pad", spy)
    with pytest.raises(KeyboardInterrupt):
        write_video_stream(tmp_path / "clip.mp4", iter(clip), 8, keeps_part=True)
    again = read_clip(tmp_path / "clip.mp4")
    assert len(again) == 3 and error(again, clip[:3]) < 2
