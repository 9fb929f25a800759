"""A cascade: a base model's videos, upscaled by super-resolution runs one after the other (W.A.L.T, section 3.5)."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from walt_jax.errors import UserError
from walt_jax.generation.asking import encoded
from walt_jax.generation.generator import Generator
from walt_jax.generation.request import Request


def upscaled(
    base: Generator, stages: Sequence[Generator], requests: Sequence[Request], latents: Sequence[np.ndarray]
) -> list[Float[np.ndarray, "t h w c"]]:
    """The latents of the last stage, which decodes them.

    A stage whose low-resolution tokenizer is the one before it gets the latents as they are; another one gets the
    decoded video, encoded by its own.

    Args:
        base: what made the first videos.
        stages: super-resolution models, in order.
        requests: of the base; prompts and seeds are those of all stages.
        latents: of the base's videos.

    Raises:
        UserError: if a stage does not upscale, or not clips of that length.
    """
    sizes = [request.size or _pixels(base) for request in requests]
    for number, stage in enumerate(stages):
        if stage.low_res is None:
            raise UserError(
                f"Run {number + 1} of the cascade does not upscale; name super-resolution runs, which have "
                "config.low_res_from."
            )
        scale, before = stage.low_res.scale, base if number == 0 else stages[number - 1]
        sizes = [(frames, height * scale, width * scale) for frames, height, width in sizes]
        if any(stage.shape(size)[0] != stage.model.latent_shape[0] for size in sizes):
            raise UserError(
                f"Run {number + 1} of the cascade upscales clips of {_pixels(stage)[0]} frames; leave --num_frames out."
            )
        if not same_tokenizer(before, stage):
            videos = before.decode(latents)
            latents = [encoded(stage.low_res.codec, stage.low_res.tokenizer, video) for video in videos]
        asked = [
            dataclasses.replace(request, size=size, given=None, low_res=low_res)
            for request, size, low_res in zip(requests, sizes, latents, strict=True)
        ]
        latents = stage.latents(asked)
    return list(latents)


def _pixels(generator: Generator) -> tuple[int, int, int]:
    """(frames, height, width) of a generator's own clips."""
    t, h, w, _ = generator.model.latent_shape
    stride, *space = generator.model.codec.tokenizer.config.strides
    return 1 + (t - 1) * stride, h * space[0], w * space[1]


def same_tokenizer(before: Generator, stage: Generator) -> bool:
    """Whether a stage's low-resolution latents are those that the model before it makes."""
    mine, theirs = before.tokenizer, stage.low_res.tokenizer
    if before.model.codec != stage.low_res.codec or jax.tree.structure(mine) != jax.tree.structure(theirs):
        return False
    return all(
        a.shape == b.shape and bool((np.asarray(a) == np.asarray(b)).all())
        for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True)
    )
