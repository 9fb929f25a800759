"""Reading video: time stamps against a slow oracle, orientation, size, damage, and real files."""

import functools
import gc
import io
import itertools
import pathlib
import tempfile
from fractions import Fraction

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from av.stream import Disposition
from PIL import ExifTags, Image, ImageOps

from walt_jax.data import hdr, video
from walt_jax.data.limits import DecodeLimits
from walt_jax.data.media import write_video
from walt_jax.data.video import ClipError, describe, frame_rate, read_clip

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"

# The reason of each unreadable file; all others in the folder can be read.
UNREADABLE = {
    "audio_only.mp4": "no video stream",
    "audio_only.ts": "no video stream",
    "encrypted_vp9.webm": "no frame decodes: Invalid data",
    "git_lfs_pointer.mp4": "not a video: Invalid data",
    "header_only.flv": "not a video: End of file",
    "html_error_page.mp4": "not a video: Invalid data",
    "invalid_bitstream_vp9.webm": "no frame decodes: Invalid data",
    "junk_prefix.mp4": "not a video: Invalid data",
    "metadata.csv": "not a video: Invalid data",
    "smallest_valid.mp4": "no video stream",
    "subtitles_only.mp4": "no video stream",
    "zero_bytes.webm": "empty file",
    "zero_frames_14B.gif": "no frame decodes: End of file",
    "zero_size_atom.mp4": "no frame decodes: Invalid data",
}


def shared_files(folder):
    files = sorted((SHARED / folder).glob("*")) if (SHARED / folder).is_dir() else []
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {SHARED / folder} on this machine"))]
    return [pytest.param(file, id=file.name) for file in files]


def shared_file(name):
    if not (SHARED / name).exists():
        pytest.skip(f"no {SHARED / name} on this machine")
    return SHARED / name


def grey(level, height=16, width=16):
    return np.full((height, width, 3), level, np.uint8)


def write_stamped(path, milliseconds, last, rotation=0, pictures=None, container=None, says=None):
    """A video of which frame i, grey of level 12 i, appears at `milliseconds[i]`; the last stays for `last` ms.

    `says` is what every frame is said to last instead of the truth.
    """
    if pictures is None:
        pictures = [grey(12 * i) for i in range(len(milliseconds))]
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("libx264", rate=1000)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"bf": "0", "crf": "1"}
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        for picture, pts in zip(pictures, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet, end in zip(packets, [*milliseconds[1:], milliseconds[-1] + last], strict=True):
            packet.duration = says or end - packet.pts
            out.mux(packet)


def silence():
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
    sound.sample_rate = 8000
    return sound


def levels(clip):
    """For each frame of a clip, the number of the frame of `write_stamped`."""
    return np.round(clip.mean((1, 2, 3)) / 12).astype(int).tolist()


def oracle(milliseconds, end, fps):
    """Frame k is the last one that has appeared k / fps seconds after the first."""
    shown, k = [], 0
    while Fraction(1000 * k) / fps < end - milliseconds[0]:
        now = milliseconds[0] + Fraction(1000 * k) / fps
        shown.append(max(i for i, appears in enumerate(milliseconds) if appears <= now))
        k += 1
    return shown


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
    gaps=st.lists(st.integers(20, 400), min_size=1, max_size=15), start=st.integers(0, 500), fps=st.integers(1, 60)
)
def test_resampling_follows_the_time_stamps(gaps, start, fps):
    stamps = (start + np.cumsum([0, *gaps[:-1]])).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        write_stamped(path, stamps, last=gaps[-1])
        assert levels(read_clip(path)) == list(range(len(stamps)))
        assert levels(read_clip(path, fps)) == oracle(stamps, stamps[-1] + gaps[-1], fps)


@pytest.mark.parametrize(
    ("suffix", "rate"), [(".mkv", 30), (".mkv", 24), (".mkv", 59.94), (".gif", 30), (".gif", 15), (".gif", 8)]
)
def test_rounded_time_stamps_repeat_and_lose_nothing(tmp_path, suffix, rate):
    # Matroska rounds to 1 ms and GIF to 10 ms: 30 fps is 0, 33, 67, 100, ... ms and 0, 30, 70, 100, ... ms.
    path = tmp_path / f"clip{suffix}"
    if suffix == ".gif":
        write_video(path, np.stack([grey(12 * i) for i in range(20)]), rate)
    else:
        stamps = [round(1000 * i / rate) for i in range(20)]
        write_stamped(path, stamps, last=round(1000 / rate))
    assert levels(read_clip(path, rate)) == list(range(20))


def test_durations_that_were_wrong_before_are_not_believed_at_the_end(tmp_path):
    write_stamped(tmp_path / "clip.mkv", [0, 200, 400, 600], last=200, says=1)
    with av.open(str(tmp_path / "clip.mkv")) as container:
        assert {frame.duration for frame in container.decode(video=0)} == {1}
    assert levels(read_clip(tmp_path / "clip.mkv", 10)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_last_picture_stays_as_long_as_it_says(tmp_path):
    write_stamped(tmp_path / "clip.mp4", [0, 100, 200], last=500)
    assert levels(read_clip(tmp_path / "clip.mp4", 10)) == [0, 1, 2, 2, 2, 2, 2]


def test_time_stamps_that_jump_an_hour_do_not_fill_memory(tmp_path):
    hour = 3_600_000
    write_stamped(tmp_path / "clip.mp4", [0, 100, 200, hour, hour + 100], last=100)
    assert levels(read_clip(tmp_path / "clip.mp4", 10)) == [0, 1, 2, 3, 4]


def test_a_file_without_time_stamps_runs_on(tmp_path):
    write_stamped(tmp_path / "clip.h264", [0, 40, 80, 120], last=40, container="h264")
    clip = read_clip(tmp_path / "clip.h264", 25)
    assert sorted(set(levels(clip))) == [0, 1, 2, 3]


def test_max_frames_gives_the_first_ones(tmp_path):
    write_stamped(tmp_path / "clip.mp4", [0, 100, 350, 400], last=100)
    for fps in (None, 8):
        whole = read_clip(tmp_path / "clip.mp4", fps)
        for count in (1, 2, 3, 100):
            np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4", fps, max_frames=count), whole[:count])


def test_decoding_stops_at_max_frames(tmp_path, monkeypatch):
    write_stamped(tmp_path / "clip.mp4", [0, 100, 200, 300, 400, 500], last=100)
    decode, decoded = video.decoded, []

    def counted(*args):
        for frame in decode(*args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "decoded", counted)
    read_clip(tmp_path / "clip.mp4", max_frames=2)
    assert len(decoded) == 2
    read_clip(tmp_path / "clip.mp4", fps=10, max_frames=2)
    assert len(decoded) == 2 + 3  # the second ends when the third begins


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_frames_come_upright(tmp_path, rotation):
    stored = grey(0, 32, 64)
    stored[:16, :32] = 255  # a white quarter at the top left
    write_stamped(tmp_path / "clip.mp4", [0], last=100, rotation=rotation, pictures=[stored])
    with av.open(str(tmp_path / "clip.mp4")) as container:
        says = next(container.decode(video=0)).rotation
    assert says % 360 == rotation % 360
    upright = np.rot90(stored, rotation // 90)  # both count counterclockwise
    clip = read_clip(tmp_path / "clip.mp4")
    assert clip.shape[1:] == upright.shape
    assert np.abs(clip[0].astype(int) - upright).mean() < 4
    assert read_clip(tmp_path / "clip.mp4", short_side=16).shape[1:3] == ((16, 32) if rotation % 180 == 0 else (32, 16))


@pytest.mark.parametrize("vflip", [False, True])
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_mirrored_videos_come_upright(tmp_path, rotation, hflip, vflip):
    stored = grey(0, 32, 64)
    stored[:16, :32] = 255  # a white quarter at the top left, and a grey one below
    stored[16:, :32] = 128
    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(rotation, hflip=hflip, vflip=vflip)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(stored)))
        out.mux(stream.encode())
    upright = np.rot90(stored, rotation // 90)
    upright = upright[:, ::-1] if hflip else upright
    upright = upright[::-1] if vflip else upright
    clip = read_clip(tmp_path / "clip.mp4")
    assert clip.shape[1:] == upright.shape
    assert np.abs(clip[0].astype(int) - upright).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_pictures_come_as_their_exif_says(tmp_path, kind, options, orientation):
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 256, (3, 5, 3), np.uint8).repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "picture", kind, exif=exif, **options)
    with Image.open(tmp_path / "picture") as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)
    clip = read_clip(tmp_path / "picture", 8)
    assert clip.shape == (1, *upright.shape) and clip.flags.c_contiguous
    assert np.abs(clip[0] - upright).mean() < 3  # YUV stores colours coarsely; another orientation is 70 off
    info = describe(tmp_path / "picture")
    assert (info.height, info.width) == upright.shape[:2]
    assert read_clip(tmp_path / "picture", short_side=24).shape[1:3] == ((24, 40) if orientation < 5 else (40, 24))


def test_no_frame_waits_for_the_garbage_collector(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    write_stamped(tmp_path / "clip.mp4", [0, 40, 80, 120], last=40, rotation=90, pictures=[stored] * 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 5
    Image.fromarray(stored).save(tmp_path / "picture.jpg", exif=exif)
    gc.collect()
    gc.disable()
    try:
        for name in ("clip.mp4", "picture.jpg"):
            read_clip(tmp_path / name)
            describe(tmp_path / name)
        frames = [thing for thing in gc.get_objects() if isinstance(thing, av.VideoFrame)]
        assert all(frame.width == frame.height == 1 for frame in frames)
    finally:
        gc.enable()


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_side_data_without_a_name_hides_no_rotation(tmp_path, rotation, monkeypatch):
    stored = np.random.default_rng(0).integers(0, 256, (2, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    write_stamped(tmp_path / "clip.mp4", [0], last=100, rotation=rotation, pictures=[stored])
    want = read_clip(tmp_path / "clip.mp4")

    def unknown(_):
        raise ValueError("99 is not a valid Type")

    monkeypatch.setattr(video, "_side_data", unknown)
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4"), want)


def test_a_phone_video_reads_the_right_way_up():
    # Red fingers hold a sheet of paper at its top.
    picture = read_clip(shared_file("bad/rot90_352x288.mp4"), max_frames=1)[0].astype(int)
    assert picture.shape == (352, 288, 3)
    redness = (picture[..., 0] - picture[..., 2])[:, 72:216].mean(1)
    assert redness[:30].mean() > 20 + redness[30:].mean()


@pytest.mark.parametrize(
    ("stored", "cover", "size"),
    [
        ((64, 96), (32, 32), (32, 48)),
        ((96, 64), (32, 32), (48, 32)),
        ((64, 96), (32, 64), (43, 64)),
        ((16, 128), (24, 24), (24, 192)),
        ((50, 70), (50, 70), (50, 70)),
    ],
)
def test_cover_is_the_smallest_size_that_does(tmp_path, stored, cover, size):
    write_video(tmp_path / "clip.mp4", np.zeros((2, *stored, 3), np.uint8), 8)
    assert read_clip(tmp_path / "clip.mp4", cover=cover).shape[1:3] == size
    if cover[0] == cover[1]:
        assert read_clip(tmp_path / "clip.mp4", short_side=cover[0]).shape[1:3] == size


def test_shrinking_is_antialiased(tmp_path):
    lines = grey(0, 128, 128)
    lines[:, ::2] = 255
    write_stamped(tmp_path / "clip.mp4", [0], last=100, pictures=[lines])
    shrunk = read_clip(tmp_path / "clip.mp4", short_side=32).astype(int)
    assert np.abs(shrunk[:, :, 2:-2] - 127).max() < 12


def test_colours_survive(tmp_path):
    for colour in [(255, 255, 255), (0, 0, 0), (250, 20, 30), (20, 200, 40), (30, 40, 220)]:
        write_video(tmp_path / "clip.mp4", np.broadcast_to(np.uint8(colour), (1, 32, 32, 3)), 8)
        limit = 1 if len(set(colour)) == 1 else 3  # grey has no rounding of chroma
        assert np.abs(read_clip(tmp_path / "clip.mp4").astype(int) - colour).max() <= limit, colour


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>" * 20, "not a video: Invalid data"),
        (None, "it can't be opened: No such"),
    ],
)
def test_what_is_not_a_video_says_so(tmp_path, content, reason):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=reason) as error:
        read_clip(path)
    assert str(path) not in str(error.value)


def test_sound_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        out.mux(stream.encode(silence()))
        out.mux(stream.encode())
    with pytest.raises(ClipError, match=r"^no video stream$"):
        read_clip(tmp_path / "clip.mp4")


def test_the_cover_of_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuvj420p"
        stream.disposition = Disposition.attached_pic
        sound = out.add_stream("aac", rate=8000)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(grey(100))))
        out.mux(stream.encode())
        out.mux(sound.encode(silence()))
        out.mux(sound.encode())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ClipError, match=r"^no video stream$"):
        read_clip(tmp_path / "clip.mp4")


def test_metadata_in_another_encoding_is_ignored(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as out:
        out.metadata["title"] = "Muenchen"
        stream = out.add_stream("libx264", rate=25)
        stream.height = stream.width = 16
        out.mux(stream.encode(av.VideoFrame.from_ndarray(grey(100))))
        out.mux(stream.encode())
    data = (tmp_path / "clip.mkv").read_bytes()
    (tmp_path / "clip.mkv").write_bytes(data.replace(b"Muenchen", b"M\xfcnchen."))
    assert len(read_clip(tmp_path / "clip.mkv")) == 1


def test_a_cut_off_file_gives_what_is_there(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (12, 32, 32, 3), np.uint8)
    with av.open(str(tmp_path / "clip.ts"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for picture in noise:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode())
    data = (tmp_path / "clip.ts").read_bytes()
    (tmp_path / "clip.ts").write_bytes(data[: len(data) // 2])
    assert 3 <= len(read_clip(tmp_path / "clip.ts")) < 12


@pytest.mark.parametrize("file", shared_files("bad"))
def test_every_file_gives_frames_or_a_reason(file):
    reason = UNREADABLE.get(file.name)
    if reason:
        with pytest.raises(ClipError, match=f"^{reason}"):
            read_clip(file, fps=8, short_side=32)
    else:
        clip = read_clip(file, fps=8, short_side=32, max_frames=400)
        assert clip.dtype == np.uint8 and clip.ndim == 4 and min(clip.shape[1:3]) == 32 and clip.shape[3] == 3


@pytest.mark.parametrize(
    ("name", "frames", "at_8_fps"),
    [
        ("zeroed_50KB.mp4", 220, 104),  # 13 s, of which 105 frames are lost and one comes back out of turn
        ("fps_reported_1000.flv", 30, 8),
        ("fps_reported_1000.mkv", 30, 8),
        ("rot180_vfr.mp4", 25, 20),
        ("resolution_change.ts", 48, 16),
        ("vfr_slow_motion.mp4", 7, 5),
        ("rate_23976.mp4", 48, 17),
    ],
)
def test_frames_and_seconds_of_odd_files(name, frames, at_8_fps):
    path = shared_file(f"bad/{name}")
    assert len(read_clip(path, short_side=16)) == frames
    assert len(read_clip(path, fps=8, short_side=16)) == at_8_fps


# Time-lapses


@pytest.mark.parametrize("seconds", [2, 60])
def test_frames_that_are_seconds_apart_stay_so(tmp_path, seconds):
    stamps = [1000 * seconds * i for i in range(20)]
    write_stamped(tmp_path / "clip.mp4", stamps, last=1000 * seconds)
    rate = frame_rate(tmp_path / "clip.mp4")
    assert rate == Fraction(1, seconds)
    assert levels(read_clip(tmp_path / "clip.mp4", rate)) == list(range(20))


@pytest.mark.parametrize(("name", "rate"), [("fps_reported_1000.mkv", 30), ("fps_reported_1000.flv", 30)])
def test_a_rate_that_can_not_be_is_measured(name, rate):
    assert float(frame_rate(shared_file(f"bad/{name}"))) == pytest.approx(rate, rel=0.02)


# High dynamic range


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_tone_mapping_keeps_greys_grey_and_in_order_and_white_at_the_top(transfer):
    ramp = np.zeros((1, 101, 3))
    ramp[..., 0] = np.linspace(0, 1, 101)
    mapped = hdr.tone_map(ramp, transfer)[0].astype(int)
    assert np.ptp(mapped, -1).max() <= 1 and (np.diff(mapped[:, 0]) >= 0).all()
    assert mapped[0].max() == 0 and mapped[-1].min() >= 254


def test_the_formulas_have_the_values_of_the_standards():
    light = np.geomspace(0.01, 10_000, 50)
    np.testing.assert_allclose(hdr.pq_to_light(hdr.light_to_pq(light)), light, rtol=1e-6)
    assert hdr.light_to_pq(np.array(203.0)) == pytest.approx(0.58, abs=0.002)  # BT.2408, table 1
    assert hdr.hlg_to_light(np.full(3, 0.75))[0] == pytest.approx(203, abs=1)  # the same
    assert hdr.compress(np.array([1.0, 50, 90])) == pytest.approx([1, 50, 90], rel=1e-3)
    assert hdr.compress(np.array([1000.0, 4000])) == pytest.approx([203, 203], rel=1e-3)


@pytest.mark.parametrize(
    "name", ["clips/exoplayer__hdr10-video-with-sdr-container.mp4", "bad/rot_dolby_vision_10bit.MOV"]
)
def test_high_dynamic_range_is_mapped_or_refused(name, monkeypatch):
    path, refuse = shared_file(name), DecodeLimits(hdr="refuse")
    picture = read_clip(path, max_frames=1, short_side=64)[0]
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert hdr.transfer_of(frame)
    with monkeypatch.context() as patch:
        patch.setattr(hdr, "transfer_of", lambda frame: None)
        unmapped = read_clip(path, max_frames=1, short_side=64)[0]
    # Without mapping colours are washed out.
    assert colourfulness(picture) > 2 * colourfulness(unmapped)
    assert np.percentile(picture, 99) > np.percentile(unmapped, 99)
    for read in (read_clip, describe):
        with pytest.raises(ClipError, match=r"^high dynamic range \((PQ|HLG)\)"):
            read(path, limits=refuse)


def colourfulness(picture):
    """Mean difference between the largest and the smallest of R, G and B."""
    return (picture.max(-1).astype(int) - picture.min(-1)).mean()


# Garbage


TEXTURE = np.kron(np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
MOVING = [np.roll(TEXTURE, 2 * number, 1)[:64, :80].copy() for number in range(24)]
DARK = [np.where(np.arange(64)[:, None, None] < 8, frame, 3).astype(np.uint8) for frame in MOVING]
CARDS = [np.full((64, 80, 3), 128, np.uint8) if 8 <= number < 16 else frame for number, frame in enumerate(MOVING)]
CODECS = {
    "libx264": {"bf": "0"},
    "libx265": {"x265-params": "log-level=none:bframes=0"},
    "mpeg4": {},
    "mpeg2video": {},
}


@functools.cache
def encoded(codec, content):
    """A file in which every eighth frame is a key frame."""
    out, frames = io.BytesIO(), {"moving": MOVING, "dark": DARK, "cards": CARDS}[content]
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=8, options=CODECS[codec])
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 80, 64, "yuv420p", 8
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return out.getvalue()


def damaged(content, which, how):
    """Damages the key frames with the numbers in `which`: only their first eighth is left."""
    out, key_frames = io.BytesIO(), itertools.count()
    with av.open(io.BytesIO(content)) as source, av.open(out, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            data = bytes(packet)
            if packet.is_keyframe and next(key_frames) in which:
                rest = len(data) - len(data) // 8
                data = data[: -rest or None] + {"cut": b"", "zeros": bytes(rest)}[how]
            changed = av.Packet(data)
            for name in ("pts", "dts", "duration", "time_base", "is_keyframe"):
                setattr(changed, name, getattr(packet, name))
            changed.stream = stream
            container.mux(changed)
    return out.getvalue()


@pytest.mark.parametrize(
    ("codec", "how"),
    # Not all: HEVC's decoder accepts zeros, VP9's also truncated frames.
    [*((codec, "cut") for codec in CODECS), *((codec, "zeros") for codec in ("libx264", "mpeg4", "mpeg2video"))],
)
def test_what_decodes_to_garbage_after_damage_is_left_out(codec, how):
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec}")
    content = encoded(codec, "moving")
    whole = read_clip(content)
    assert len(whole) == 24
    np.testing.assert_array_equal(read_clip(damaged(content, {0}, how)), whole[8:])
    if codec.startswith("mpeg"):  # all frames of it decode, to one colour
        with pytest.raises(ClipError, match="no frame decodes: its frames are damaged, and mostly of one colour"):
            read_clip(damaged(encoded("mpeg4", "moving"), {0, 1, 2}, how))


def test_what_is_of_one_colour_without_damage_or_before_it_is_kept():
    assert len(read_clip(encoded("mpeg4", "cards"))) == 24
    assert len(read_clip(damaged(encoded("mpeg4", "dark"), {1, 2}, "zeros"))) == 24
