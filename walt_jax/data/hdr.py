"""Tone mapping: high dynamic range (PQ, HLG) to BT.709, by formulas of the ITU.

1. Y'CbCr of BT.2020 to R'G'B' (BT.2020, table 4).
2. PQ or HLG to light in cd/m² (BT.2100, tables 4 and 5; HLG on a display of 1,000 cd/m², system gamma 1.2).
3. Up to 1,000 cd/m² is compressed to 203, HDR's reference white (BT.2408), by the curve of BT.2390, §5.4. The curve is
   applied to the largest of R, G and B and scales all three, which keeps hues. Below 92 cd/m² nothing changes.
4. Primaries of BT.2020 to BT.709 (BT.2087); colours outside are clipped.
5. Light to R'G'B' for a display of gamma 2.4 (BT.1886).
"""

import av
import numpy as np
from av.video.reformatter import ColorRange, ColorTrc
from jaxtyping import Float, UInt8, UInt16

PQ, HLG = ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67
TRANSFERS = {PQ: "PQ", HLG: "HLG"}

SOURCE_PEAK, TARGET_PEAK = 1000.0, 203.0  # cd/m²

# BT.2100's constants.
PQ_M1, PQ_M2 = 2610 / 16384, 2523 / 32
PQ_C1, PQ_C2, PQ_C3 = 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
LUMA = np.array([0.2627, 0.6780, 0.0593])  # of BT.2020
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def transfer_of(frame: av.VideoFrame) -> str | None:
    """The transfer function, "PQ" or "HLG"; None for standard dynamic range."""
    return TRANSFERS.get(frame.color_trc)


def tone_map(yuv: Float[np.ndarray, "h w 3"], transfer: str) -> UInt8[np.ndarray, "h w 3"]:
    """Maps a picture to standard dynamic range.

    Args:
        yuv: Y' in [0, 1], Cb and Cr in [-0.5, 0.5], of BT.2020 with non-constant luminance.
        transfer: "PQ" or "HLG".

    Returns:
        R'G'B' of BT.709.
    """
    light = (pq_to_light if transfer == "PQ" else hlg_to_light)(_to_rgb(yuv))
    largest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    light *= compress(largest) / largest
    light = np.clip(light @ TO_709.T / TARGET_PEAK, 0, 1)
    return np.round(255 * light ** (1 / 2.4)).astype(np.uint8)


def normalised(planes: UInt16[np.ndarray, "h w 3"], color_range: int) -> Float[np.ndarray, "h w 3"]:
    """16-bit Y', Cb, Cr to [0, 1], [-0.5, 0.5], [-0.5, 0.5]."""
    values = planes.astype(np.float32) / 256  # in 8-bit levels
    black, luma, chroma = (0, 255, 255) if color_range == ColorRange.JPEG else (16, 219, 224)
    return np.concatenate([(values[..., :1] - black) / luma, (values[..., 1:] - 128) / chroma], -1)


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100's EOTF: [0, 1] to cd/m²."""
    power = np.clip(signal, 0, 1) ** (1 / PQ_M2)
    return 10_000 * (np.maximum(power - PQ_C1, 0) / (PQ_C2 - PQ_C3 * power)) ** (1 / PQ_M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """The inverse of `pq_to_light`."""
    power = (np.clip(light, 0, 10_000) / 10_000) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)) ** PQ_M2


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100's inverse OETF and OOTF: R'G'B' in [0, 1] to cd/m² on a display of SOURCE_PEAK."""
    signal = np.clip(signal, 0, 1)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - HLG_C) / HLG_A) + HLG_B) / 12)
    return SOURCE_PEAK * np.maximum(scene @ LUMA, 1e-9)[..., None] ** 0.2 * scene


def compress(light: np.ndarray) -> np.ndarray:
    """BT.2390's EETF without a black level: [0, SOURCE_PEAK] cd/m² to [0, TARGET_PEAK]."""
    peak = light_to_pq(np.array(SOURCE_PEAK))
    highest = light_to_pq(np.array(TARGET_PEAK)) / peak
    knee = 1.5 * highest - 0.5
    level = np.minimum(light_to_pq(light) / peak, 1)
    t = (np.maximum(level, knee) - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * highest
    return pq_to_light(np.where(level < knee, level, spline) * peak)


def _to_rgb(yuv: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(yuv, -1, 0)
    red = y + 2 * (1 - LUMA[0]) * cr
    blue = y + 2 * (1 - LUMA[2]) * cb
    return np.stack([red, (y - LUMA[0] * red - LUMA[2] * blue) / LUMA[1], blue], -1)
