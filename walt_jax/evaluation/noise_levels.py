"""The denoiser's loss on unseen clips, by noise level: where a model is good, and where it still learns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from walt_jax.data.frame_groups import FrameGroups, frame_groups
from walt_jax.denoiser.layout import Layout
from walt_jax.diffusion.objective import Binned, diffusion_loss, draw, level_names
from walt_jax.generation.generator import Generator
from walt_jax.generation.latent_diffusion import NEVER, LatentDiffusion, single_clips
from walt_jax.generation.packs import pack
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

    No frame is observed; low-resolution latents have no noise. Adaptive noise levels are left out. A model that is
    trained on groups of frames is measured on such: at most `Generator.call` latent frames of each clip at their
    places in it, new ones each time, of which those drawn as observed are.

    Returns:
        (sums for each part of diffusion time, their protocol)
    """
    model, config = generator.model, generator.model.diffusion
    size = min(generator.config.batch_size, len(clips))
    errors = None if generator.call else _errors(model, size)
    total = Binned(np.zeros(len(level_names())), np.zeros(len(level_names())))
    for first in range(0, len(clips), size):
        rows = np.minimum(np.arange(first, first + size), len(clips) - 1)
        there = np.arange(first, first + size) < len(clips)
        texts = generator.captions.encode([captions[row] for row in rows])
        latents = together(model.codec.encode, generator.tokenizer, clips[rows])[0]
        low_res = None if generator.low_res is None else generator.low_res.encode(clips[rows])
        for number in range(ROUNDS):
            key = jax.random.fold_in(jax.random.key(seed), first * ROUNDS + number)
            if errors is None:
                groups = _groups(latents.shape[1], generator.call, [seed, first, number], size)
                arguments = *packed(model, fetched(latents), texts, groups, generator.call), there, key
                found = together(_errors_of_groups, model, generator.params, *arguments)
            else:
                found = together(errors, generator.params, latents, texts, low_res, there, key)
            total = jax.tree.map(np.add, total, jax.tree.map(fetched, found))
    protocol = (
        f"mean squared error of the predicted {config.parameterization} at diffusion times of this part of 0..100 % "
        f"({config.schedule.name} schedule), {len(clips)} unseen clips, {ROUNDS} times and noises each"
        + f", groups of at most {generator.call} latent frames with gaps, of which some are observed"
        * bool(generator.call)
        + ", with the variational loss" * model.denoiser.config.learned_sigma
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


def _groups(total: int, most: int, seed: Sequence[int], count: int) -> list[FrameGroups]:
    return [frame_groups(total, most, np.random.default_rng([*seed, clip])) for clip in range(count)]


def packed(
    model: LatentDiffusion,
    latents: Float[np.ndarray, "b t h w c"],
    texts: Any,
    groups: Sequence[FrameGroups],
    most: int,
) -> tuple[Layout, Any, Float[np.ndarray, "1 n p"], Float[np.ndarray, "1 n q"]]:
    """Groups of frames as one pack, as a model is trained on them.

    Args:
        model: see `LatentDiffusion`.
        latents: of whole clips.
        texts: of each clip.
        groups: of each clip.
        most: frames of a clip, for which the pack has room, so that many draws are one shape.

    Returns:
        (the pack's layout, its clips' texts, its tokens, 1 at observed positions)
    """
    count, total, *place = latents.shape
    kept = [one[group.frames] for one, group in zip(latents, groups, strict=True)]
    until = [
        np.broadcast_to(np.where(group.observed, 0, NEVER)[:, None, None, None], (*one.shape[:3], 1))
        for one, group in zip(kept, groups, strict=True)
    ]
    frames = [(total, group.frames.tolist()) for group in groups]
    room = count * int(np.prod(model.denoiser.config.grid((most, *place[:2]))))
    shapes, seeds, given = [one.shape for one in kept], np.zeros(count, np.uint32), list(zip(kept, until, strict=True))
    made = pack(model, shapes, texts, texts, seeds, given, frames, room).asked
    return made.layout, made.text, made.observed, (made.until == 0).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _errors_of_groups(model, params, layout, text_tokens, tokens, mask, there, key) -> Binned:
    """Of a pack, whose first clips are `there` or not."""
    config, clips = model.diffusion, layout.pack.sizes.shape[:2]
    there = jnp.pad(there, (0, clips[1] - len(there)))[None, :, None].astype(tokens.dtype)
    counted = layout.spread(there) * (1 - model.per_value(mask))
    return diffusion_loss(
        model.denoise(params, model.condition(params, text_tokens, tokens, mask), layout),
        tokens,
        counted,
        layout.clip_sizes().prod(-1),
        jnp.zeros(clips),
        layout.spread,
        draw(key, tokens.shape, clips, config),
        config,
    )[1]
