"""The denoiser's loss on unseen clips, by noise level: where a model is good, and where it still learns."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from walt_jax.diffusion.objective import Binned, diffusion_loss, draw, level_names
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import LatentDiffusion, single_clips
from walt_jax.parallel.processes import fetched, together

ROUNDS = 8  # times and noises of each clip


def loss_by_noise(
    generator: Generator, clips: UInt8[np.ndarray, "n t h w 3"], captions: Sequence[str], seed: int
) -> list[dict]:
    """The training loss of clips by noise level, see `noise_losses`.

    Returns:
        {"name", "value", "unit", "protocol"} for each part of diffusion time.
    """
    found, protocol = noise_losses(generator, clips, captions, seed)
    return [
        {"name": f"loss_{name}", "value": float(error / count), "unit": "", "protocol": protocol}
        for name, error, count in zip(level_names(), found.total, found.count, strict=True)
        if count
    ]


def noise_losses(
    generator: Generator, clips: UInt8[np.ndarray, "n t h w 3"], captions: Sequence[str], seed: int
) -> tuple[Binned, str]:
    """The training loss of clips at times and with noise that depend only on the seed.

    No frame is observed; low-resolution latents have no noise. Adaptive noise levels are left out.

    Returns:
        (sums for each part of diffusion time, their protocol)
    """
    model, config = generator.model, generator.model.diffusion
    size = min(generator.config.batch_size, len(clips))
    errors = _errors(model, size)
    total = Binned(np.zeros(len(level_names())), np.zeros(len(level_names())))
    for first in range(0, len(clips), size):
        rows = np.minimum(np.arange(first, first + size), len(clips) - 1)
        there = np.arange(first, first + size) < len(clips)
        texts = generator.captions.encode([captions[row] for row in rows])
        latents = together(model.codec.encode, generator.tokenizer, clips[rows])[0]
        low_res = None if generator.low_res is None else generator.low_res.encode(clips[rows])
        for number in range(ROUNDS):
            key = jax.random.fold_in(jax.random.key(seed), first * ROUNDS + number)
            found = together(errors, generator.params, latents, texts, low_res, there, key)
            total = jax.tree.map(np.add, total, jax.tree.map(fetched, found))
    protocol = (
        f"mean squared error of the predicted {config.parameterization} at diffusion times of this part of 0..100 % "
        f"({config.schedule.name} schedule), {len(clips)} unseen clips, {ROUNDS} times and noises each"
        + ", with the variational loss"
        * model.denoiser.config.learned_sigma
    )
    return total, protocol


@functools.lru_cache(maxsize=8)
def _errors(model: LatentDiffusion, size: int) -> Callable[..., Binned]:
    """Of batches of so many clips; compiled once for all validations of a stage."""
    config = model.diffusion

    @jax.jit
    def errors(params, latents, text_tokens, low_res, there, key):
        layout, tokens = model.layout_of(latents), model.tokens(latents)
        mask = model.tokens(jnp.zeros((*latents.shape[:-1], 1)))
        condition = model.condition(
            params, single_clips(text_tokens), jnp.zeros_like(tokens), mask, low_res, jnp.zeros((size, 1))
        )
        counted = jnp.broadcast_to(there[:, None, None], tokens.shape).astype(tokens.dtype)
        count = jnp.full((size, 1), tokens.shape[1], jnp.float32)
        return diffusion_loss(
            model.denoise(params, condition, layout),
            tokens,
            counted,
            count,
            jnp.zeros((size, 1)),  # a complexity that leaves times as they are
            layout.spread,
            draw(key, tokens.shape, (size, 1), config),
            config,
            lambda values: model.latents(values, layout),
        )[1]

    return errors
