"""Clips encoded once: what the frozen tokenizer makes of them need not be computed again at every step."""

import io
import pathlib
from collections.abc import Callable

import grain
import numpy as np
import tqdm
from jaxtyping import Float, Int

from walt_jax.workdir import write_atomically


def latents_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a stage's encoded clips are kept."""
    return workdir / "latents" / f"{stage}.npz"


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
