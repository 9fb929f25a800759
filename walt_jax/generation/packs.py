"""Requests of several sizes as one pack: what each gives in it, it gives alone (NaViT's packing, in sampling)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from walt_jax.denoiser.config import DenoiserConfig
from walt_jax.denoiser.layout import Grid, Layout, Needs, PackRows, frame_tokens, from_tokens, make_pack, place_clips
from walt_jax.generation.latent_diffusion import NEVER, Asked, LatentDiffusion, SamplingConfig

Shape = tuple[int, int, int, int]
UNIT = 128  # a pack's length is a multiple
TEXT_ROW = 64  # tokens of a row for attention to text apart from windows
SLOTS = 4  # for clips, at least


def can_pack(model: LatentDiffusion, config: SamplingConfig) -> bool:
    """Whether clips in a pack give what they give alone.

    The noise that "ddpm" adds, and what guidance and FirstBlockCache measure over a clip, would be a whole pack's;
    convolutions of super-resolution and of outputs need equal clips.
    """
    denoiser = model.denoiser.config
    whole = config.guidance.measures_clips or config.sampler == "ddpm" or config.first_block_cache > 0
    return not whole and denoiser.upscale == 1 and not denoiser.output_conv


def filled(grids: Sequence[Grid], room: int) -> Iterator[list[int]]:
    """Numbers of clips that share a pack of at most so many tokens: each goes to the first with room for it."""
    packs: list[list[int]] = []
    left: list[int] = []
    for number, tokens in enumerate(int(np.prod(grid)) for grid in grids):
        place = next((place for place, free in enumerate(left) if free >= tokens), None)
        if place is None:
            packs.append([])
            left.append(room)
            place = -1
        packs[place].append(number)
        left[place] -= tokens
    yield from packs


class Packed(NamedTuple):
    """A pack to sample from.

    Attributes:
        noise: standard normal, each clip's that which it has alone.
        asked: see `Asked`.
        grids: tokens of each clip along (t, h, w), those that are there.
    """

    noise: Float[np.ndarray, "1 n p"]
    asked: Asked
    grids: list[Grid]

    def clips(self, model: LatentDiffusion, tokens: Float[np.ndarray, "1 n p"]) -> list[Float[np.ndarray, "t h w c"]]:
        """The latents of each clip."""
        found, start = [], 0
        for grid in self.grids:
            end = start + int(np.prod(grid))
            found.append(as_latents(tokens[0, start:end], grid, model.denoiser.config.patch_size))
            start = end
        return found


def as_latents(tokens: Float[np.ndarray, "n p"], grid: Grid, patch: Grid) -> Float[np.ndarray, "t h w c"]:
    """The latents of a clip's tokens."""
    return np.asarray(from_tokens(tokens[None], grid, patch)[0])


def rounded(count: int) -> int:
    """The next of four values an octave, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …: up to a quarter more."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def few(needs: Needs, config: DenoiserConfig, length: int, slots: int) -> PackRows:
    """Rows for a pack, of few shapes, so that packs of similar requests share a program.

    Args:
        needs: of the pack.
        config: the model's.
        length: tokens of the pack.
        slots: its most clips.
    """
    windows = {
        # At least as many as the whole pack would fill, so that the number is that of most packs of this length.
        name: tuple(
            (rounded(size), power(max(number, length // rounded(size))), power(clips) if clips else 0)
            for size, number, clips in each
        )
        for name, each in PackRows.choose([needs], most=1, text=config.text_windows).windows.items()
    }
    # Each clip has one row at most that is not full.
    text_rows = (TEXT_ROW, length // TEXT_ROW + slots) if config.text_alone else None
    while not PackRows(windows, text_rows).hold(needs):  # larger rows may be filled in a worse way
        windows = {
            name: tuple((size, 2 * number, clips) for size, number, clips in each) for name, each in windows.items()
        }
    return PackRows(windows, text_rows)


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def pack(
    model: LatentDiffusion,
    shapes: Sequence[Shape],
    text: Any,
    free: Any,
    seeds: np.ndarray,
    given: Sequence[tuple[np.ndarray, np.ndarray] | None],
    frames: Sequence[tuple[int, Sequence[int]] | None] = (),
    room: int = 0,
) -> Packed:
    """Makes a pack of clips. Its shapes are rounded up: many mixes of sizes share few compiled programs.

    Args:
        model: see `LatentDiffusion`.
        shapes: (t, h, w, c) of each clip's latents.
        text, free, seeds: of each clip, as `LatentDiffusion.sample` has them.
        given: (latents, until when they are followed) of each clip, or None.
        frames: of each clip, how many latent frames its video has and which of them it is; None, or nothing for all
            clips: it is a whole video.
        room: tokens that the pack has at least.
    """
    config = model.denoiser.config
    grids = [config.grid(shape[:3]) for shape in shapes]
    length = rounded(-(-max(room, sum(int(np.prod(grid)) for grid in grids)) // UNIT)) * UNIT
    slots = max(SLOTS, power(len(grids)))
    videos, kept = list(grids), [np.arange(np.prod(grid)) for grid in grids]
    for number, those in enumerate(frames):
        if those is not None:
            videos[number] = those[0], *grids[number][1:]
            kept[number] = frame_tokens(videos[number], those[1])
    positions, sizes = place_clips([videos], length, slots, [kept])
    windows, isolate = config.attention_windows, config.isolate_images
    rows = few(Needs.of(positions, sizes, windows, isolate), config, length, slots)
    layout = Layout(pack=make_pack(positions, sizes, windows, rows, isolate))
    width = int(np.prod(config.patch_size))
    noise = np.zeros((1, length, width * shapes[0][3]), np.float32)
    observed, until = np.zeros_like(noise), np.full((1, length, width), NEVER, np.float32)
    start = 0
    for number, (shape, grid) in enumerate(zip(shapes, grids, strict=True)):
        end = start + int(np.prod(grid))
        noise[0, start:end] = model.tokens(model.noise(seeds[number : number + 1], shape))[0]
        if given[number] is not None:
            latents, times = given[number]
            observed[0, start:end] = model.tokens(latents[None])[0]
            until[0, start:end] = model.tokens(times[None])[0]
        start = end
    row = np.minimum(np.arange(slots), len(grids) - 1)[None]  # slots without a clip repeat the last one's text
    texts = [jax.tree.map(lambda array: np.asarray(array)[row], one) for one in (text, free)]
    keys = jax.vmap(jax.random.key)(seeds[:1])
    return Packed(noise, Asked(layout, *texts, keys, observed, until), grids)
