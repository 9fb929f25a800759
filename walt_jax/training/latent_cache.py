"""Clips encoded once and trained on again and again, of one size or in packs of several."""

import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np
import tqdm
from jaxtyping import Float, Int

from walt_jax.data.packing import Item, Packed
from walt_jax.denoiser.layout import make_pack, place_clips, row_lengths, to_tokens
from walt_jax.denoiser.model import DenoiserConfig
from walt_jax.workdir import write_atomically

WAITING = 256  # clips among which a pack is chosen
ENCODED_AT_ONCE = 8


def latents_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """The file of a stage's encoded clips."""
    return workdir / "latents" / f"{stage}.npz"


def encode_clips(
    path: pathlib.Path,
    encode: Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]],
    clips: Callable[[], Iterable[dict[str, Any]]],
    count: int,
) -> list[dict[str, np.ndarray]]:
    """Encodes clips, or reads them where an interrupted run has done so.

    Args:
        path: an `.npz` to keep them in; it is complete or absent.
        encode: uint8 video [b, t, h, w, 3] to normalised latents.
        clips: {"video", "text"} each, of any sizes; those of one size are encoded together.
        count: how many there are, for the progress.

    Returns:
        Of each size {"latents": float32 [clips, t, h, w, c], "text": int32 [clips, n]}, in the order of sizes.
    """
    if not path.exists():
        write_atomically(path, _encoded(encode, clips(), count))
    with np.load(path) as cached:
        numbers = range(len(cached.files) // 2)
        return [{name: cached[f"{name}_{number}"] for name in ("latents", "text")} for number in numbers]


def _encoded(
    encode: Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]], clips: Iterable[dict[str, Any]], count: int
) -> bytes:
    """The file's content."""
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    latents: dict[tuple[int, ...], list[Float[np.ndarray, "b t h w c"]]] = {}
    text: dict[tuple[int, ...], list[Int[np.ndarray, " n"]]] = {}
    progress = tqdm.tqdm(total=count, desc="encoding clips", unit="clip", dynamic_ncols=True)

    def flush(size: tuple[int, ...]) -> None:
        alike = waiting.pop(size)
        # The last ones of a size are filled up, so that one program does for all.
        video = np.stack([clip["video"] for clip in alike + alike[-1:] * (ENCODED_AT_ONCE - len(alike))])
        latents.setdefault(size, []).append(np.asarray(encode(video))[: len(alike)])
        text.setdefault(size, []).extend(clip["text"] for clip in alike)
        progress.update(len(alike))

    with progress:
        for clip in clips:
            size = clip["video"].shape
            waiting.setdefault(size, []).append(clip)
            if len(waiting[size]) == ENCODED_AT_ONCE:
                flush(size)
        for size in list(waiting):
            flush(size)
    content = io.BytesIO()
    arrays = {}
    for number, size in enumerate(sorted(latents)):
        arrays[f"latents_{number}"] = np.concatenate(latents[size])
        arrays[f"text_{number}"] = np.stack(text[size])
    np.savez(content, **arrays)
    return content.getvalue()


def cached_batches(arrays: dict[str, np.ndarray], batch_size: int, seed: int) -> grain.IterDataset:
    """Endless batches of the arrays' rows, each once an epoch."""
    return (
        grain.MapDataset.range(len(arrays["text"]))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda index: {name: array[index] for name, array in arrays.items()})
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size))
        .batch(batch_size)
    )


def packed_batches(
    shapes: Sequence[dict[str, np.ndarray]],
    config: DenoiserConfig,
    batch_size: int,
    tokens: int,
    clips: int,
    seed: int,
) -> grain.IterDataset:
    """Endless batches of packs: {"tokens": [b, n, p], "text": [b, s, m], "pack"}, each clip once an epoch.

    Args:
        shapes: arrays as `encode_clips` returns them.
        config: of the denoiser.
        batch_size: packs a batch.
        tokens: of a pack, at least those of the largest clip.
        clips: most of a pack.
        seed: of the order.
    """
    latents = [to_tokens(arrays["latents"], config.patch_size) for arrays in shapes]
    grids = [config.grid(arrays["latents"].shape[1:4]) for arrays in shapes]
    owners = np.concatenate([np.full(len(rows), shape) for shape, rows in enumerate(latents)])
    rows = np.concatenate([np.arange(len(rows)) for rows in latents])
    width = latents[0].shape[-1]
    longest = max(arrays["text"].shape[1] for arrays in shapes)
    windows = config.attention_windows
    # As many of each shape as there are in a few hundred, and one at least.
    shares = [max(1, round(256 * len(rows) / len(owners))) for rows in latents]
    each = place_clips([[grid] for grid, share in zip(grids, shares, strict=True) for _ in range(share)], tokens, 1)
    lengths = row_lengths(*each, windows, config.images_alone)

    def arrays_of(packs: list[list[Item]]) -> dict[str, Any]:
        places = [[(owners[item.index], rows[item.index]) for item in pack] for pack in packs]
        positions, sizes = place_clips([[grids[owner] for owner, _ in pack] for pack in places], tokens, clips)
        batch = np.zeros((len(packs), tokens, width), np.float32)
        text = np.zeros((len(packs), clips, longest), np.int32)
        for number, pack in enumerate(places):
            content = np.concatenate([latents[owner][row] for owner, row in pack])
            batch[number, : len(content)] = content
            for segment, (owner, row) in enumerate(pack):
                text[number, segment] = shapes[owner]["text"][row]
        pack = make_pack(positions, sizes, windows, lengths, config.images_alone)
        return {"tokens": batch, "text": text, "pack": pack}

    items = (
        grain.MapDataset.range(len(owners))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda index: (int(index), int(np.prod(grids[owners[index]]))))
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
    )
    return Packed(items, batch_size, tokens, clips, WAITING).map(arrays_of)
