"""Latent normalisation: each channel's mean and standard deviation over training clips, as W.A.L.T has it."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.parallel.processes import fetched


def latent_statistics(
    encode: Callable[[UInt8[np.ndarray, "b t h w 3"]], Float[np.ndarray, "b t h w c"]],
    batches: Iterable[dict[str, np.ndarray]],
    clips: int,
) -> dict[str, list[float]]:
    """{"latent_mean", "latent_std"}: a value a channel, over at least `clips` clips of `batches`."""
    latents, done = [], 0
    for batch in batches:
        encoded = fetched(encode(batch["video"])).astype(np.float64)
        latents.append(encoded.reshape(-1, encoded.shape[-1]))
        done += len(batch["video"])
        if done >= clips:
            break
    values = np.concatenate(latents)
    return {"latent_mean": values.mean(0).tolist(), "latent_std": np.maximum(values.std(0), 1e-6).tolist()}
