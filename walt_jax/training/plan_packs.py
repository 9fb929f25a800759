"""Shapes of a stage's batches of packs, from its config only: they depend on no clip."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.denoiser.layout import make_pack, place_clips
from walt_jax.training.pack_batches import Packing, pack_rows, trial_shards
from walt_jax.training.run_config import RunConfig, make_model


class PackBatch(NamedTuple):
    """A batch of packs.

    Attributes:
        batch: shapes, structured as `pack_batches` makes batches.
        clips: how many a batch has on average.
        tokens: of them, padding left out.
    """

    batch: dict[str, Any]
    clips: float
    tokens: float


def pack_batch(config: RunConfig, name: str, shards: int) -> PackBatch:
    """A stage's batch, with clips of each size that its shapes may have, as often as `shape.weight` says.

    Args:
        config: has the stage.
        name: of the stage.
        shards: parts of the batch that a device each computes, micro-batches counted.
    """
    stage, denoiser = config.stages[name], config.denoiser_of(name)
    sizes = config.latent_sizes(name)
    grids, weights = [denoiser.grid(size) for size in sizes], np.array(list(sizes.values())) / sum(sizes.values())
    pack = stage.pack
    packing = Packing(denoiser, stage.batch_size, pack.tokens, pack.clips, 0, 0.0, pack.drop, pack.frames, shards)
    trials = trial_shards(grids, weights, packing)
    clips, tokens = (
        shards * np.mean(counts)
        for counts in zip(*((len(each), sum(clip.tokens for clip in each)) for each in trials), strict=True)
    )
    rows = pack_rows(trials, grids, packing)
    model = make_model(config, config.most_pieces, name)

    def made() -> dict[str, Any]:
        positions, places = place_clips([[]] * stage.batch_size, stage.pack.tokens, stage.pack.clips)
        windows, isolate = denoiser.attention_windows, denoiser.isolate_images
        text = model.text_tokens(stage.batch_size * stage.pack.clips, config.text_length)
        observed = {"observed": jnp.zeros((stage.batch_size, stage.pack.tokens, 1))} if stage.pack.frames else {}
        width = config.tokenizer.latent_channels * int(np.prod(denoiser.patch_size))
        return {
            "tokens": jnp.zeros((stage.batch_size, stage.pack.tokens, width)),
            "text": jax.tree.map(lambda x: x.reshape(stage.batch_size, stage.pack.clips, *x.shape[1:]), text),
            "pack": jax.tree.map(jnp.asarray, make_pack(positions, places, windows, rows, isolate, shards)),
            **observed,
        }

    return PackBatch(jax.eval_shape(made), float(clips), float(tokens))
