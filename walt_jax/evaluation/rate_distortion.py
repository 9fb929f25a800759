"""The rate-distortion plot: a tokenizer's bits and PSNR compared with H.264's on the same clips."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image

from walt_jax.evaluation.reconstruction import psnr_db

QUALITIES = (14, 20, 26, 32, 38, 44)


def h264_points(clips: Sequence[UInt8[np.ndarray, "t h w 3"]], fps: float) -> list[dict[str, float | str]]:
    """H.264 (x264, 4:4:4, preset "medium") at several constant qualities: packets only, without a container's bytes.

    Returns:
        {"codec", "setting", "bits_per_pixel", "psnr_db"} each, means over the clips.
    """
    points: list[dict[str, float | str]] = []
    for quality in QUALITIES:
        coded = [_h264(clip, fps, quality) for clip in clips]
        bits = sum(size for size, _ in coded) * 8 / sum(clip[..., 0].size for clip in clips)
        psnr = float(np.mean([psnr_db(clip, video) for clip, (_, video) in zip(clips, coded, strict=True)]))
        points.append({"codec": "H.264", "setting": f"crf {quality}", "bits_per_pixel": bits, "psnr_db": psnr})
    return points


def _h264(clip: UInt8[np.ndarray, "t h w 3"], fps: float, quality: int) -> tuple[int, UInt8[np.ndarray, "t h w 3"]]:
    """(bytes, the decoded clip)."""
    _, height, width, _ = clip.shape
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv444p"
    encoder.time_base = 1 / Fraction(fps).limit_denominator(1001)
    encoder.options = {"crf": str(quality), "threads": "1", "mbtree": "0"}
    packets = []
    for index, frame in enumerate(clip):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv444p")
        picture.pts = index
        packets += encoder.encode(picture)
    packets += encoder.encode()
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for packet in packets for frame in decoder.decode(packet)] + decoder.decode()
    video = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return sum(packet.size for packet in packets), video


def plot(points: Sequence[dict[str, float | str]]) -> Image.Image:
    """PSNR over bits a pixel, a line for each codec."""
    figure = Figure(figsize=(6.4, 4.4), dpi=120)
    axes = figure.subplots()
    for codec in dict.fromkeys(point["codec"] for point in points):
        mine = sorted((point["bits_per_pixel"], point["psnr_db"]) for point in points if point["codec"] == codec)
        axes.plot(*zip(*mine, strict=True), marker="o", label=codec)
    axes.set(xscale="log", xlabel="bits a pixel", ylabel="PSNR (dB)")
    # Within few decades Matplotlib labels every minor tick, and the labels overlap.
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    content.seek(0)
    return Image.open(content)
