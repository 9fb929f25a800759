"""How well the tokenizer reconstructs clips that it was not trained on."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from walt_jax.data.media import compare_sheet


def psnr_db(original: UInt8[np.ndarray, "t h w 3"], reconstruction: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Peak signal-to-noise ratio of a clip: one mean squared error over all frames, pixels and colours, peak 255."""
    error = np.square(original.astype(np.float64) - reconstruction).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def reconstruct_all(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    reconstruct: Callable[[UInt8[np.ndarray, "b t h w 3"]], UInt8[np.ndarray, "b t h w 3"]],
    batch_size: int = 8,
) -> list[UInt8[np.ndarray, "t h w 3"]]:
    """Each clip through the tokenizer and back; the last batch is filled up, so that one shape is compiled."""
    reconstructions: list[np.ndarray] = []
    for first in range(0, len(clips), batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), len(clips) - 1)
        batch = np.asarray(reconstruct(np.stack([clips[row] for row in rows])))
        reconstructions.extend(batch[: len(clips) - first])
    return reconstructions


def reconstruction_sheet(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    reconstructions: Sequence[UInt8[np.ndarray, "t h w 3"]],
    titles: Sequence[str],
) -> Image.Image:
    """Original, reconstruction and their absolute difference, a block of rows for each clip."""
    rows = []
    for clip, reconstruction, title in zip(clips, reconstructions, titles, strict=True):
        error = np.abs(clip.astype(np.int16) - reconstruction).astype(np.uint8)
        title = f"{title} ({psnr_db(clip, reconstruction):.1f} dB)".strip()
        rows.append((title, [("original", clip), ("reconstruction", reconstruction), ("error", error)]))
    return compare_sheet(rows)
