"""Clips encoded once and trained on again and again, of one size or in packs of several."""

import io
import pathlib
from collections.abc import Callable, Sequence
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


def latents_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """The folder of a stage's encoded clips."""
    return workdir / "latents" / stage


def encode_clips(
    path: pathlib.Path,
    encode: Callable[[np.ndarray], Float[np.ndarray, "b t h w c"]],
    batches: Callable[[], grain.IterDataset],
    clips: int,
) -> dict[str, np.ndarray]:
    """Encodes the first `clips` clips of `batches`, or reads them where an interrupted run has done so.

    Args:
        path: an `.npz` to keep them in; it is complete or absent.
        encode: uint8 video to normalised latents.
        batches: of {"video", "text"}.
        clips: how many.

    Returns:
        {"latents": float32 [clips, t, h, w, c], "text": int32 [clips, n]}.
    """
    if path.exists():
        with np.load(path) as cached:
            return dict(cached)
    latents: list[Float[np.ndarray, "b t h w c"]] = []
    text: list[Int[np.ndarray, "b n"]] = []
    done = 0
    with tqdm.tqdm(total=clips, desc="encoding clips", unit="clip", dynamic_ncols=True) as progress:
        for batch in batches():
            latents.append(np.asarray(encode(batch["video"])))
            text.append(batch["text"])
            done += len(batch["text"])
            progress.update(len(batch["text"]))
            if done >= clips:
                break
    arrays = {"latents": np.concatenate(latents)[:clips], "text": np.concatenate(text)[:clips]}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
    return arrays


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
        shapes: arrays as `encode_clips` returns them, of each size of clip.
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
