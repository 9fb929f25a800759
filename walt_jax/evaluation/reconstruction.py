"""Measures reconstructions: PSNR, SSIM, LPIPS, and the bits that codes take."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from skimage.metrics import structural_similarity

from walt_jax.data.media import compare_sheet
from walt_jax.data.pipeline import Source
from walt_jax.errors import UserError
from walt_jax.generation.codec import Codec, TrainedTokenizer, to_float
from walt_jax.parallel.processes import fetched, together
from walt_jax.tokenizer.perceptual import FeatureWeights, feature_distance
from walt_jax.tokenizer.quantizers import code_statistics, joint_index

SSIM_WINDOW = 11
BATCH = 8
Clip = UInt8[np.ndarray, "t h w 3"]


def usable_clips(source: Source, indices: Iterable[int], count: int, seed: int) -> tuple[list[Clip], list[str]]:
    """A random window and crop of each of the first `count` usable clips among `indices`, and its caption.

    Raises:
        UserError: if no clip is usable.
    """
    found = (source.sample(index, np.random.default_rng([seed, index])) for index in indices)
    usable = list(itertools.islice((clip for clip in found if clip is not None), count))
    if not usable:
        raise UserError("No held-out clip can be read any more; --mode=data says why.")
    return [clip["video"] for clip in usable], [clip["caption"] for clip in usable]


def psnr_db(original: Clip, reconstruction: Clip) -> float:
    """Peak signal-to-noise ratio of a clip: one mean squared error over all frames, pixels and colours, peak 255."""
    error = np.square(original.astype(np.float64) - reconstruction).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def ssim(original: Clip, reconstruction: Clip) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window, σ = 1.5), the mean over frames and colours."""
    similarity = functools.partial(
        structural_similarity,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(np.mean([similarity(*pair) for pair in zip(original, reconstruction, strict=True)]))


def in_batches(function: Callable[[np.ndarray], np.ndarray], items: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Applies a function of batches to items; the last batch is padded, so that one shape is compiled."""
    results: list[np.ndarray] = []
    for first in range(0, len(items), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(items) - 1)
        results.extend(fetched(function(np.stack([items[row] for row in rows])))[: len(items) - first])
    return results


def code_bits(codec: Codec, clip: Clip) -> float | None:
    """Bits that a clip's codes take, log2(number of codes) each; None for a head without codes."""
    if not codec.codes:
        return None
    positions = math.prod(codec.tokenizer.config.latent_shape(*clip.shape[:3])[:3])
    return positions * math.log2(math.prod(codec.codes))


def measure(
    codec: Codec,
    trained: TrainedTokenizer,
    clips: Sequence[Clip],
    captions: Sequence[str],
    features: FeatureWeights | None = None,
) -> tuple[list[Clip], list[dict], dict[str, float]]:
    """Reconstructs clips of one size.

    Args:
        codec, trained: the tokenizer.
        clips: the originals.
        captions: one for each clip, for the result.
        features: weights for LPIPS.

    Returns:
        The reconstructions; a row for each clip, {"caption", "psnr_db", "ssim"}, with "lpips" if there are weights and
        "bits_per_pixel" if there are codes; and {"code_perplexity", "code_usage"} over the codes of all clips.
    """
    latents = in_batches(lambda video: together(codec.encode, trained, video)[0], clips)
    reconstructions = in_batches(lambda latents: together(codec.decode, trained, latents)[0], latents)
    distance = jax.jit(lambda one, other: feature_distance(features, to_float(one), to_float(other)))
    rows = []
    for clip, reconstruction, caption in zip(clips, reconstructions, captions, strict=True):
        row = {"caption": caption, "psnr_db": psnr_db(clip, reconstruction)}
        if min(clip.shape[1:3]) >= SSIM_WINDOW:
            row["ssim"] = ssim(clip, reconstruction)
        if features is not None:
            row["lpips"] = float(distance(clip[None], reconstruction[None])[0])
        bits = code_bits(codec, clip)
        if bits is not None:
            row["bits_per_pixel"] = bits / math.prod(clip.shape[:3])
        rows.append(row)
    if not codec.codes:
        return reconstructions, rows, {}
    indices = np.stack(in_batches(functools.partial(together, codec.tokenize, trained), clips))
    return reconstructions, rows, {k: float(v) for k, v in code_statistics(jnp.asarray(indices), codec.codes).items()}


def entropy_bits(symbols: Int[np.ndarray, "..."]) -> float:
    """Bits that an ideal coder that knows the symbols' frequencies needs for all of them."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / symbols.size)).sum())


def rate_distortion(codec: Codec, trained: TrainedTokenizer, clips: Sequence[Clip]) -> list[dict[str, float | str]]:
    """Points (bits a pixel, PSNR) of the tokenizer.

    Codes give one point. Continuous latents are rounded to multiples of a step, and each step from 2 to 1/16 gives a
    point. Bits are those of an ideal coder; continuous channels are coded separately.

    Returns:
        {"codec", "setting", "bits_per_pixel", "psnr_db"} each.
    """
    pixels = len(clips) * math.prod(clips[0].shape[:3])
    latents = np.stack(in_batches(lambda video: together(codec.encode, trained, video)[0], clips))
    if codec.codes:
        indices = np.stack(in_batches(functools.partial(together, codec.tokenize, trained), clips))
        choices = [("codes", entropy_bits(np.asarray(joint_index(jnp.asarray(indices), codec.codes))), latents)]
    else:
        choices = []
        for exponent in range(1, -5, -1):
            symbols = np.round(latents / 2.0**exponent).astype(np.int32)
            bits = sum(entropy_bits(symbols[..., channel]) for channel in range(symbols.shape[-1]))
            choices.append((f"step {2.0**exponent:g}", bits, (symbols * 2.0**exponent).astype(np.float32)))
    points: list[dict[str, float | str]] = []
    for setting, bits, values in choices:
        videos = in_batches(lambda latents: together(codec.decode, trained, latents)[0], values)
        psnr = float(np.mean([psnr_db(*pair) for pair in zip(clips, videos, strict=True)]))
        points.append({"codec": "this tokenizer", "setting": setting, "bits_per_pixel": bits / pixels, "psnr_db": psnr})
    return points


def reconstruction_sheet(clips: Sequence[Clip], reconstructions: Sequence[Clip], titles: Sequence[str]) -> Image.Image:
    """A picture with original, reconstruction and their absolute difference for each clip."""
    rows = []
    for clip, reconstruction, title in zip(clips, reconstructions, titles, strict=True):
        error = np.abs(clip.astype(np.int16) - reconstruction).astype(np.uint8)
        title = f"{title} ({psnr_db(clip, reconstruction):.1f} dB)".strip()
        rows.append((title, [("original", clip), ("reconstruction", reconstruction), ("error", error)]))
    return compare_sheet(rows)
