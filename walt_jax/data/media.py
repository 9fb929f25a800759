"""Writes videos, and contact sheets of frames with captions."""

import functools
import io
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from walt_jax.errors import UserError
from walt_jax.signals import Hold, held

# Layout of sheets, in pixels. Frames with a side below READABLE are enlarged by an integer factor.
READABLE = 96
MARGIN = 8
GAP = 2
FONT_SIZE = 15
LINE_HEIGHT = 19
CAPTION_LINES = 3

PALETTE_PIXELS = 2**22

BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)


def write_video(path: epath.PathLike, frames: np.ndarray, fps: float, tags: Mapping[str, str] | None = None) -> None:
    """Writes a clip as H.264 (`.mp4`) or as a looping GIF (`.gif`); equal frames give equal bytes.

    H.264 needs even sizes: an odd side is padded by repeating the last line of pixels. GIF has 256 colours, one palette
    for the whole clip, and times in hundredths of a second, at least two; equal consecutive frames are merged.

    Args:
      path: local or remote; the suffix chooses the format.
      frames: uint8 [t, h, w, 3], RGB.
      fps: frames per second.
      tags: of the file, such as "title" and "comment"; a GIF has the comment alone.

    Raises:
      UserError: another suffix.
    """
    path = epath.Path(path)
    write = {".mp4": mp4, ".gif": _gif}.get(path.suffix.lower())
    if write is None:
        raise UserError(f"{path} can't be written as video: give it a name that ends in .mp4 or .gif.")
    path.write_bytes(write(frames, fps, tags or {}))


def contact_sheet(
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    frames_per_clip: int = 5,
    columns: int = 2,
    scale: int | None = None,
) -> Image.Image:
    """A grid with a cell per clip: evenly spaced frames in a row, and the caption below.

    Args:
      clips: uint8 [t, h, w, 3] each; sizes and lengths may differ.
      captions: one per clip; text beyond three lines is cut off with an ellipsis.
      frames_per_clip: maximum number of frames of a clip.
      columns: cells per row.
      scale: integer factor of enlargement; None enlarges small clips to at least READABLE pixels.
    """
    strips = [_strip(clip, frames_per_clip, scale) for clip in clips]
    width = max(strip.width for strip in strips)
    cells = [stack([strip, _text(caption, width)]) for strip, caption in zip(strips, captions, strict=True)]
    rows = [_side_by_side(cells[i : i + columns], width) for i in range(0, len(cells), columns)]
    return _frame(stack(rows, MARGIN))


def compare_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]],
    frames_per_clip: int = 5,
    scale: int | None = None,
) -> Image.Image:
    """For each (title, [(label, clip), ...]): the title, then its clips below each other, aligned in time.

    Args:
      rows: clips are uint8 [t, h, w, 3], such as an original, its reconstruction and their difference.
      frames_per_clip: maximum number of frames of a clip.
      scale: as in `contact_sheet`.
    """
    rows = [(title, [(label, _strip(clip, frames_per_clip, scale)) for label, clip in clips]) for title, clips in rows]
    strips = [strip for _, labelled in rows for _, strip in labelled]
    labels = [label for _, labelled in rows for label, _ in labelled]
    label_width = round(max(map(_font().getlength, labels))) + MARGIN
    width = label_width + max(strip.width for strip in strips)
    blocks = []
    for title, labelled in rows:
        lines = [_side_by_side([_text(label, label_width), strip], label_width, 0) for label, strip in labelled]
        blocks.append(stack([_text(title, width), *lines], GAP))
    return _frame(stack(blocks, MARGIN))


def write_video_stream(
    path: epath.PathLike,
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    tags: Mapping[str, str] | None = None,
    keeps_part: bool = False,
) -> int:
    """Encodes an iterator of frames as H.264, with memory for a few frames; the file is written atomically.

    Args:
      path: a local path that ends in .mp4.
      frames: uint8 [h, w, 3], RGB; all of one size.
      fps: frames per second.
      tags: of the file, such as "title" and "comment".
      keeps_part: whether, if `frames` raises after some, or a signal comes, the file has those, and the error goes on.

    Returns:
      The number of frames; of none there is no file.
    """
    path = Path(path)
    if keeps_part:
        with held() as hold:
            ended = _Ended(frames, hold)
            count = _write_stream(path, ended, fps, tags or {})
        if ended.error is not None:
            raise ended.error
        return count
    return _write_stream(path, frames, fps, tags or {})


def _write_stream(path: Path, frames: Iterable[np.ndarray], fps: float | Fraction, tags: Mapping[str, str]) -> int:
    # Nothing is there before the first frame: a process that is killed until then leaves nothing behind.
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return 0
    _UNFINISHED.add(path)
    try:
        # In the same folder, so that renaming is atomic.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing_") as folder:
            count = _encode_mp4(Path(folder) / path.name, itertools.chain([first], frames), fps, tags)
            os.replace(Path(folder) / path.name, path)
    finally:
        _UNFINISHED.discard(path)
    return count


_UNFINISHED: set[Path] = set()


def unfinished() -> bool:
    """Whether a video is being written that has frames already: the process should not be ended before it is."""
    return bool(_UNFINISHED)


class _Ended:
    """An iterator that ends where another raises, and keeps what that raised. Signals may come while that one works."""

    def __init__(self, frames: Iterable[np.ndarray], hold: Hold):
        self._frames, self._hold, self.error = iter(frames), hold, None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            try:
                with self._hold.allowed():
                    frame = next(self._frames, None)
            except BaseException as error:  # also of a signal
                self.error = error
                return
            if frame is None:
                return
            yield frame


def mp4(frames: np.ndarray, fps: float, tags: Mapping[str, str] | None = None) -> bytes:
    """What `write_video` writes of a clip into a file that ends in `.mp4`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        _encode_mp4(file, frames, fps, tags or {})
        return file.read_bytes()


def _encode_mp4(file: Path, frames: Iterable[np.ndarray], fps: float | Fraction, tags: Mapping[str, str]) -> int:
    # To move the index to the front ("faststart"), FFmpeg reads its output again, which needs a real file.
    options = {"movflags": "faststart", "fflags": "bitexact"}
    stream, count = None, 0
    with av.open(str(file), "w", format="mp4", options=options) as container:
        container.metadata.update(tags)
        for frame in frames:
            count += 1
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                # Without the tag, players guess the matrix from the size.
                stream.codec_context.colorspace = Colorspace.SMPTE170M
                stream.codec_context.color_range = ColorRange.MPEG
                # For equal bytes: x264's output depends on its threads, and at some widths, such as 112, its macroblock
                # tree reads uninitialised memory.
                stream.options = {"crf": "12", "threads": "1", "mbtree": "0"}
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return count


def _gif(frames: np.ndarray, fps: float, tags: Mapping[str, str]) -> bytes:
    # One palette for all frames, since palettes per frame flicker; computed from a subset of frames, to be fast.
    chosen = frames[_evenly(len(frames), max(16, PALETTE_PIXELS // frames[0, ..., 0].size))]
    palette = Image.fromarray(np.concatenate(list(chosen))).quantize(256, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    # Differences of rounded times, so that rounding errors don't accumulate; viewers slow down frames under 20 ms.
    times = np.round(100 / fps * np.arange(len(frames) + 1))
    milliseconds = [int(10 * max(2, ticks)) for ticks in np.diff(times)]
    out = io.BytesIO()
    pictures[0].save(
        out,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=milliseconds,
        loop=0,
        optimize=False,
        comment=tags.get("comment", ""),
    )
    return out.getvalue()


def _evenly(length: int, count: int) -> np.ndarray:
    """At most `count` evenly spaced indices in [0, length), with both ends."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def _strip(clip: np.ndarray, count: int, scale: int | None) -> Image.Image:
    """Up to `count` frames of a clip in a row, enlarged without smoothing."""
    stills = clip[_evenly(len(clip), count)]
    _, height, width, _ = stills.shape
    scale = scale or max(1, -(-READABLE // min(height, width)))
    stills = stills.repeat(scale, axis=1).repeat(scale, axis=2)
    return _side_by_side([Image.fromarray(still) for still in stills], width * scale, GAP)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", FONT_SIZE)
    except OSError:  # not installed; Pillow's own font has little beyond ASCII
        return ImageFont.load_default(FONT_SIZE)


def _text(text: str, width: int) -> Image.Image:
    """The text, wrapped to `width` pixels; cut off with an ellipsis after CAPTION_LINES."""
    fits = _font().getlength
    lines, words = [], text.split()
    while words and len(lines) < CAPTION_LINES:
        count = 1
        while count < len(words) and fits(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " …"
    for i, line in enumerate(lines):
        while fits(line) > width and len(line) > 1:
            line = line.removesuffix("…").rstrip()[:-1] + "…"
        lines[i] = line
    image = Image.new("RGB", (width, LINE_HEIGHT * max(1, len(lines)) + GAP), BACKGROUND)
    ImageDraw.Draw(image).multiline_text((0, GAP), "\n".join(lines), INK, _font(), spacing=LINE_HEIGHT - FONT_SIZE)
    return image


def stack(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """The images below each other, left-aligned."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), BACKGROUND)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def _side_by_side(images: Sequence[Image.Image], step: int, gap: int = MARGIN) -> Image.Image:
    """The images in a row, one every `step` + `gap` pixels."""
    width = (step + gap) * (len(images) - 1) + images[-1].width
    sheet = Image.new("RGB", (width, max(image.height for image in images)), BACKGROUND)
    for i, image in enumerate(images):
        sheet.paste(image, (i * (step + gap), 0))
    return sheet


def _frame(image: Image.Image) -> Image.Image:
    """The image with a margin."""
    sheet = Image.new("RGB", (image.width + 2 * MARGIN, image.height + 2 * MARGIN), BACKGROUND)
    sheet.paste(image, (MARGIN, MARGIN))
    return sheet
