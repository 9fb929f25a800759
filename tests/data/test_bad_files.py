"""Untrusted files: decompression bombs, endless files, files that are no video, and memory over many decodes."""

import io
import os
import pathlib
import struct
import time
import zlib

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from walt_jax.data import decode
from walt_jax.data.limits import ClipError, DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.video import describe, read_clip, read_frames

BAD = pathlib.Path(__file__).parents[3] / "shared/data/bad"

NOISE = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)


def rss_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def png(width, height, rows):
    """A PNG whose header says width x height, of which `rows` are there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes((1 + 3 * width) * rows)))
        + chunk(b"IEND", b"")
    )


def gif(width, height):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"


def jpeg(width, height):
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    size = struct.pack(">HH", 16, 16)
    assert out.getvalue().count(b"\xff\xc0\x00\x11\x08" + size) == 1
    return out.getvalue().replace(b"\x08" + size, b"\x08" + struct.pack(">HH", height, width), 1)


def write_ts(path, pictures):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "4"}
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a short MPEG transport stream, of which any part may be missing."""
    return write_ts(tmp_path_factory.mktemp("good") / "clip.ts", NOISE)


# Limits


@pytest.mark.parametrize(
    "bomb",
    [png(40_000, 40_000, 10), png(16_000, 16_000, 10), gif(60_000, 60_000), gif(12_000, 12_000), jpeg(16_000, 16_000)],
)
def test_bombs_are_refused_before_their_pictures_take_memory(tmp_path, bomb):
    (tmp_path / "bomb.png").write_bytes(bomb)
    before = rss_bytes()
    for read in (read_clip, describe):
        # Beyond 2**28 pixels, FFmpeg calls them invalid.
        with pytest.raises(ClipError, match=r"^(too large|no frame decodes: Invalid data)"):
            read(tmp_path / "bomb.png")
    assert rss_bytes() - before < 2**24


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_limits_are_exact(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    write_video(path, NOISE, 8)
    fits = DecodeLimits(longest_side=48, pixels=32 * 48, seconds=1.5, packets=12, clip_bytes=NOISE.nbytes)
    assert read_clip(path, 8, limits=fits).shape == NOISE.shape
    assert describe(path, fits).width == 48
    for limits, reason in [
        (DecodeLimits(longest_side=47), "too large: 48 x 32 pixels, where a side may have 47"),
        (DecodeLimits(pixels=32 * 48 - 1), "too large: 48 x 32 pixels, where a picture may have 1535"),
        (DecodeLimits(seconds=1.1), "longer than 1.1 s"),
        (DecodeLimits(packets=11), "more than 11 packets"),
        (DecodeLimits(clip_bytes=NOISE.nbytes - 1), "more than 55295 bytes at 32 x 48 pixels"),
        (DecodeLimits(wall_seconds=0), "decoding takes longer than 0 s"),
    ]:
        with pytest.raises(ClipError) as error:
            read_clip(path, 8, limits=limits)
        assert str(error.value) == reason
    assert len(read_clip(path, 8, max_frames=4, limits=DecodeLimits(seconds=1.1, packets=11))) == 4


@pytest.mark.parametrize("by", ["pixels", "longest_side"])
def test_a_picture_that_grows_within_the_file_is_refused(good, tmp_path, by):
    large = write_ts(tmp_path / "clip.ts", np.repeat(np.repeat(NOISE, 12, 1), 12, 2))
    path = tmp_path / "clip.ts"
    path.write_bytes(good + large)
    assert read_clip(path).shape == (24, *NOISE.shape[1:])
    limits = DecodeLimits(**{by: {"pixels": 48 * 32, "longest_side": 48}[by]})
    with pytest.raises(ClipError, match=r"^too large"):
        read_clip(path, limits=limits)
    assert len(read_clip(path, max_frames=5, limits=limits)) == 5


def test_packets_without_a_frame_end(good, tmp_path, monkeypatch):
    # A stream whose pictures are all lost: parameter sets and nothing that decodes.
    (tmp_path / "clip.ts").write_bytes(good)
    empty = DecodeLimits(empty_packets=5)

    def endless(container, stream):
        while True:
            yield av.Packet(b"\0\0\0\1\x09\x10")

    assert len(read_clip(tmp_path / "clip.ts", limits=empty)) == len(NOISE)
    monkeypatch.setattr("walt_jax.data.video.packets", endless)
    with pytest.raises(ClipError, match=r"^6 packets in a row without a frame$"):
        read_clip(tmp_path / "clip.ts", limits=empty)


def test_a_disk_that_answers_slowly_is_cut_off(good, tmp_path, monkeypatch):
    class Slow(io.BytesIO):
        def read(self, size=-1):
            time.sleep(0.05)
            return super().read(min(size, 188))

    monkeypatch.setattr(decode, "_readable", lambda path: Slow(good))
    start = time.monotonic()
    with pytest.raises(ClipError, match=r"^decoding takes longer than 0\.3 s$"):
        read_clip("clip.ts", limits=DecodeLimits(wall_seconds=0.3))
    assert time.monotonic() - start < 2


def test_time_that_the_caller_takes_is_not_counted(good, tmp_path):
    (tmp_path / "clip.ts").write_bytes(good)
    seen = 0
    for _ in read_frames(tmp_path / "clip.ts", limits=DecodeLimits(wall_seconds=1)):
        seen += 1
        time.sleep(0.12)
    assert seen == len(NOISE)


# What is no video


def test_what_is_no_file(good, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    for name, reason in [
        ("folder.mp4", "a folder, not a file"),
        ("pipe.mp4", "a pipe or a device, not a file"),
        ("zero.mp4", "a pipe or a device, not a file"),
        ("loop.mp4", "it can't be opened: Too many levels of symbolic links"),
        ("gone.mp4", "it can't be opened: No such file or directory"),
        ("a\0b.mp4", "it can't be opened: embedded null byte"),
    ]:
        for read in (read_clip, describe):
            with pytest.raises(ClipError) as error:
                read(tmp_path / name)
            assert str(error.value).replace("stat: ", "").replace("character in path", "byte") == reason


@pytest.mark.parametrize("name", ["new\nline.ts", "100% é #?.ts", "http:clip.ts", "-.ts", "%03d.ts", "b\udcff.ts"])
def test_any_name_reads(good, tmp_path, name):
    (tmp_path / name).write_bytes(good)
    (tmp_path / "link.ts").symlink_to(tmp_path / name)
    assert len(read_clip(tmp_path / name)) == len(read_clip(tmp_path / "link.ts")) == len(NOISE)


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile good.ts\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.ts\n#EXT-X-ENDLIST\n",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
        b"a=rtpmap:96 H264/90000\r\n",
    ],
    ids=["list of files", "playlist", "address"],
)
def test_a_file_that_names_others_does_not_make_us_read_them(good, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.ts").write_bytes(good)
    (tmp_path / "clip.mp4").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ClipError, match=r"^not a video"):
        read_clip(tmp_path / "clip.mp4", limits=DecodeLimits(wall_seconds=5))
    assert time.monotonic() - start < 1


# Damage


@hypothesis.settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_damage_gives_frames_or_a_reason(good, tmp_path, data):
    content = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        junk = data.draw(st.binary(max_size=300))
        content[at : at + data.draw(st.integers(0, 2000))] = junk
    path = tmp_path / "clip.ts"
    path.write_bytes(content)
    start = data.draw(st.integers(0, 12))
    limits = DecodeLimits(wall_seconds=20, pixels=2**20)
    try:
        assert describe(path, limits).frames >= 1
        clip = read_clip(path, 25, max_frames=200, limits=limits)
        assert clip.dtype == np.uint8 and 1 <= len(clip) <= 200
        assert len(read_clip(path, 25, max_frames=3, start=min(start, len(clip) - 1), limits=limits)) >= 1
    except ClipError as error:
        assert 5 < len(str(error)) < 100


# Still pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (33, 17)])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, kind, mode, size):
    pixels = np.full((*size, 3), (200, 60, 90), np.uint8)
    picture = Image.fromarray(pixels)
    picture = Image.fromarray(np.full(size, 200 * 257, np.uint16)) if mode == "I;16" else picture.convert(mode)
    try:
        picture.save(tmp_path / "picture", kind, **({"lossless": True} if kind == "WEBP" else {}))
    except (OSError, KeyError):
        pytest.skip(f"{kind} holds no {mode}")
    clip = read_clip(tmp_path / "picture", 8)
    assert clip.shape == (1, *size, 3)
    info = describe(tmp_path / "picture")
    assert (info.frames, info.height, info.width) == (1, *size)
    if mode in ("RGB", "RGBA"):
        assert np.abs(clip[0].astype(int) - pixels).max() <= (6 if kind in ("JPEG", "GIF", "JPEG2000") else 2)


# For a long time


def decode_again_and_again(count, warm_up):
    """Decodes the bad folder until there were `count` decodes; by how much its memory grew after the first ones."""
    files = sorted(BAD.glob("*")) if BAD.is_dir() else []
    if not files:
        pytest.skip(f"no {BAD} on this machine")
    base, most, done, frames, reasons, rounds = None, 0, 0, 0, 0, 0
    while done < count:
        for file in files:
            if rounds % 16 and file.stat().st_size > 600_000:
                continue  # 4K takes most of the time
            try:
                frames += len(read_clip(file, 8, max_frames=2, short_side=16, start=rounds % 2))
            except ClipError:
                reasons += 1
            done += 1
        rounds += 1
        if done >= warm_up:
            base = base or rss_bytes()
            most = max(most, rss_bytes())
    assert frames and reasons
    print(f"{done} decodes, {frames} frames, {reasons} reasons; {base / 2**20:.1f} MiB, at most {most / 2**20:.1f}")
    return most / base - 1


def test_memory_stays_over_300_decodes():
    assert decode_again_and_again(300, warm_up=100) < 0.1


@pytest.mark.slow
def test_memory_stays_over_20_000_decodes():
    assert decode_again_and_again(20_000, warm_up=1_000) < 0.05
