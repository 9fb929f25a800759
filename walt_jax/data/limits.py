"""How much a single file may cost to decode: what keeps decompression bombs and endless files out."""

import dataclasses
import time
from typing import Literal


class ClipError(Exception):
    """A file that cannot give frames. The message is the short reason, without the file's path."""


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """What a file may ask for; a file that asks for more is a `ClipError`. The defaults let 8K films through.

    Attributes:
      longest_side: pixels, of a picture as it is stored.
      shortest_side: pixels, of an upright picture; a source leaves out what is smaller (`Store`). Reading a file
        directly takes any size.
      hdr: what becomes of high dynamic range, PQ and HLG: "tone_map" (see `hdr`), or "refuse".
      pixels: of one picture; a larger one is refused before memory is taken for it, also in the middle of a file.
      seconds: of the clip's clock, up to the last frame that is asked for; without a rate, frames are not timed.
      packets: compressed ones, of the video stream.
      empty_packets: in a row without a frame.
      clip_bytes: of the array that `read_clip` returns.
      wall_seconds: for a whole `read_clip` or `describe`, and for each frame of a `read_frames`. It is looked at
        between packets and reads; `Watchdog` also ends a call that hangs within one.
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
        """Raises ClipError where a picture is too large."""
        if max(width, height) > self.longest_side:
            raise ClipError(f"too large: {width} x {height} pixels, where a side may have {self.longest_side}")
        if width * height > self.pixels:
            raise ClipError(f"too large: {width} x {height} pixels, where a picture may have {self.pixels}")


class Stopwatch:
    """Raises ClipError once more than a number of seconds have passed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._start > self.seconds:
            raise ClipError(f"decoding takes longer than {self.seconds:g} s")
