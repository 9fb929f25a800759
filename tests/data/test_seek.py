"""Windows of files equal those of the slow twin, which decodes everything."""

import functools
import pathlib
import tempfile
from fractions import Fraction

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from walt_jax.data import seek, video
from walt_jax.data.limits import ClipError
from walt_jax.data.media import write_video
from walt_jax.data.video import describe, read_clip, read_frames

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"

# Chosen for variety: B-frames, one and many key frames, uneven stamps, damage, several containers and codecs.
FILES = {
    "clips/intel__one-by-one-person-detection.mp4": True,
    "clips/exoplayer__sample_with_increasing_timestamps_320w_240h.mp4": True,
    "clips/torchcodec__nasa_13013.mp4": True,
    "clips/moviepy__example.mp4": True,
    "clips/cogvideo__horse.mp4": True,
    "clips/zamba__savanna_07120049.AVI": True,
    "bad/alpha_vp9.webm": True,
    "bad/long_5000f_32x32.mp4": True,
    "bad/zeroed_50KB.mp4": False,
    "bad/vfr_slow_motion.mp4": False,
    "bad/resolution_change.ts": False,
    "bad/not_seekable_3frames.ts": False,
    "bad/three_frames.mp4": False,
    "bad/rot_dolby_vision_10bit.MOV": False,
    "clips/gymnasium__tutorials_environment-creation-example-episode.gif": False,
}

MOST = 90  # frames of a file that are compared


@functools.cache
def beginning(path, fps):
    return read_clip(path, fps, MOST, cover=(12, 16))


@pytest.fixture
def from_key_frames(monkeypatch):
    """How often frames came from a key frame in the middle, and what was decoded in all."""
    seen = {"began": 0, "gave_up": 0, "decoded": 0}

    def counted_decode(*args):
        for frame in decode(*args):
            seen["decoded"] += 1
            yield frame

    def counted_seek(*args):
        seen["began"] += 1
        try:
            yield from resample_from(*args)
        except video.NeedsAllFrames:
            seen["gave_up"] += 1
            raise

    decode, resample_from = seek.decoded, seek.resample_from
    monkeypatch.setattr(seek, "decoded", counted_decode)
    monkeypatch.setattr(video, "decoded", counted_decode)
    monkeypatch.setattr(video, "resample_from", counted_seek)
    return seen


def check_windows(data, path, rates, examples=4):
    for _ in range(examples):
        fps = data.draw(st.sampled_from(rates))
        want = beginning(path, fps)
        start = data.draw(st.integers(0, len(want) - 1))
        count = data.draw(st.integers(1, 6))
        got = read_clip(path, fps, min(count, MOST - start), cover=(12, 16), start=start)
        np.testing.assert_array_equal(got, want[start : start + count])


def shared_file(name):
    if not (SHARED / name).exists():
        pytest.skip(f"no {SHARED / name} on this machine")
    return SHARED / name


@pytest.mark.parametrize("name", FILES, ids=lambda name: pathlib.Path(name).stem)
@hypothesis.settings(deadline=None, max_examples=5, derandomize=True)
@hypothesis.given(data=st.data())
def test_windows_of_real_files(name, data):
    check_windows(data, shared_file(name), [2, 29.97, None])


@pytest.mark.parametrize(("name", "seeks"), FILES.items(), ids=[pathlib.Path(name).stem for name in FILES])
def test_where_decoding_begins_at_a_key_frame(name, seeks, from_key_frames):
    path = shared_file(name)
    next(read_frames(path, 8, start=int(7.6 * describe(path).seconds)))  # near the end
    assert (from_key_frames["began"] > from_key_frames["gave_up"]) == seeks


def test_only_what_is_needed_is_decoded(from_key_frames):
    path = shared_file("bad/long_5000f_32x32.mp4")
    assert read_clip(path, 24, 4, start=4000).shape == (4, 32, 32, 3)
    assert from_key_frames["decoded"] < 300 and from_key_frames["gave_up"] == 0


def write_gops(path, stamps, key_every, b_frames, codec="libx264"):
    """Random pictures that appear at `stamps`, in milliseconds; every so often a key frame."""
    pictures = np.random.default_rng(0).integers(0, 255, (len(stamps), 4, 4, 3), np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=1000)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = key_every
        stream.codec_context.max_b_frames = b_frames
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "x264-params": f"bframes={b_frames}:open-gop=1:scenecut=0"}
        for picture, stamp in zip(pictures, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(picture.repeat(8, 0).repeat(8, 1), format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
    data=st.data(),
    gaps=st.lists(st.sampled_from([20, 33, 40, 41, 250, 3000]), min_size=4, max_size=60),
    suffix=st.sampled_from([".mp4", ".mkv", ".ts", ".mov"]),
    key_every=st.integers(1, 12),
    b_frames=st.integers(0, 3),
    codec=st.sampled_from(["libx264", "libx264", "mpeg4"]),
)
def test_windows_of_uneven_files(data, gaps, suffix, key_every, b_frames, codec):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"clip{suffix}"
        write_gops(path, np.cumsum([0, *gaps]), key_every, b_frames, codec)
        check_windows(data, path, [3, 10, 30])
    beginning.cache_clear()


@pytest.mark.parametrize("gap", [11_000, 3_600_000])
def test_a_broken_clock_before_the_window_is_noticed(tmp_path, gap, from_key_frames):
    stamps = np.cumsum([0] + [100] * 10 + [gap] + [100] * 40)
    write_gops(tmp_path / "clip.mp4", stamps, 5, 0)
    whole = read_clip(tmp_path / "clip.mp4", 10)
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4", 10, 3, start=30), whole[30:33])
    assert len(whole) < 60
    with pytest.raises(ClipError, match=r"^it ends before frame"):  # by the stamps it is there
        read_clip(tmp_path / "clip.mp4", 10, 3, start=int(stamps[-5]) // 100)
    assert from_key_frames["began"] == from_key_frames["gave_up"] == 2


@pytest.mark.parametrize("lie", ["too late", "too early", "elsewhere", "nowhere"])
def test_a_seek_that_leads_elsewhere_is_noticed(tmp_path, monkeypatch, lie, from_key_frames):
    write_gops(tmp_path / "clip.mp4", np.arange(60) * 100, 5, 2)
    whole = read_clip(tmp_path / "clip.mp4", 10)
    honest, calls = seek.packets, []

    def lying(container, stream):
        calls.append(None)
        found = list(honest(container, stream))
        if len(calls) == 2:  # the first reads the beginning, the second goes on from where the seek led
            if lie == "too early":
                container.seek(0, stream=stream)
                found = list(honest(container, stream))
            found = {"too late": found[12:], "elsewhere": found[::-1], "nowhere": []}.get(lie, found)
        yield from found

    monkeypatch.setattr(seek, "packets", lying)
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4", 10, 4, start=33), whole[33:37])
    assert len(calls) == 2 and from_key_frames["gave_up"] == (lie != "too early")


def test_a_packet_that_does_not_decode_within_the_window(tmp_path, from_key_frames):
    write_gops(tmp_path / "clip.mp4", np.arange(60) * 100, 5, 0)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    content[packets[37].pos : packets[37].pos + packets[37].size] = bytes(packets[37].size)
    (tmp_path / "clip.mp4").write_bytes(content)
    whole = read_clip(tmp_path / "clip.mp4", 10)
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4", 10, 8, start=33), whole[33:41])
    assert from_key_frames["gave_up"] == 1


@pytest.mark.parametrize("fps", [8, None])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_window_beyond_the_end(tmp_path, fps, suffix):
    path = tmp_path / f"clip{suffix}"
    write_video(path, np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8), 8)
    assert len(read_clip(path, fps, start=8)) == len(read_clip(path, fps, 5, start=8)) == 1
    with pytest.raises(ClipError, match=r"^it ends before frame 9$"):
        read_clip(path, fps, start=9)
