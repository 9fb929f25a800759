"""What is asked for: a video of a prompt, of a size, with what is given of it."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MAX_SEED = 2**32 - 1  # seeds are uint32

Size = tuple[int, int, int]  # frames, height and width in pixels


class Given(NamedTuple):
    """What is given of a video, as normalised latents.

    Attributes:
        latents: values where nothing is given are not read.
        until: the time, 0..1, down to which each position follows them, see `LatentDiffusion.sample`.
    """

    latents: Float[np.ndarray, "t h w c"]
    until: Float[np.ndarray, "t h w 1"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A video that is asked for. What comes out depends on nothing else, not on other requests of the same batch.

    Attributes:
        prompt: a caption, or a class's name.
        seed: of its noise.
        negative_prompt: what guidance leads away from; empty is no caption.
        size: (frames, height, width) in pixels; None is what the model was trained for last.
        given: parts of it.
        low_res: latents of the low-resolution video, for super-resolution.
        frames: numbers of the latent frames that are made of the video, sorted; `given` then has these only. None is
            all of them.
    """

    prompt: str = ""
    seed: int = 0
    negative_prompt: str = ""
    size: Size | None = None
    given: Given | None = None
    low_res: Float[np.ndarray, "t h w c"] | None = None
    frames: tuple[int, ...] | None = None
