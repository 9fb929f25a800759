"""Limits on decoding a single file, against decompression bombs and endless files."""

import dataclasses
import time
from typing import Literal


class ClipError(Exception):
    """A file can't be decoded. The message is the short reason, without the file's path."""


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """Limits on a file; a file that exceeds one is a `ClipError`. The defaults allow 8K films.

    Attributes:
      longest_side: maximum side of a stored picture, in pixels.
      shortest_side: minimum side of an upright picture, in pixels. Sources skip smaller files (`Store`); reading a file
        directly accepts any size.
      hdr: high dynamic range, PQ and HLG: "tone_map" (see `hdr`) or "refuse".
      pixels: maximum of one picture; larger ones are refused before memory is allocated, also in the middle of a file.
      seconds: maximum time stamp up to the last frame that is read; not checked without a frame rate.
      packets: maximum number of compressed packets of the video stream.
      empty_packets: maximum number of consecutive packets without a frame.
      clip_bytes: maximum size of the array that `read_clip` returns.
      wall_seconds: timeout of `read_clip` and `describe`, and of each frame of `read_frames`. Checked between packets
        and reads; `Watchdog` also ends calls that hang within one.
    """

    longest_side: int = 2**14
    shortest_side: int = 16
    hdr: Literal["tone_map", "refuse"] = "tone_map"
    pixels: int = 2**26
    seconds: float = 24 * 3600
    packets: int = 10_000_000
    empty_packets: int = 10_000
    clip_bytes: int = 2**32
    wall_seconds: float = 600

    def check_size(self, width: int, height: int) -> None:
        """Raises ClipError if a picture is too large."""
        if max(width, height) > self.longest_side:
            raise ClipError(f"too large: {width} x {height} pixels, where a side may have {self.longest_side}")
        if width * height > self.pixels:
            raise ClipError(f"too large: {width} x {height} pixels, where a picture may have {self.pixels}")


class Stopwatch:
    """Its `check` raises ClipError once `seconds` have passed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._start > self.seconds:
            raise ClipError(f"decoding takes longer than {self.seconds:g} s")
