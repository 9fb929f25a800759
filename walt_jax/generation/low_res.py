"""The condition of super-resolution: a clip at low resolution, as latents of the base stage's tokenizer."""

import dataclasses

import numpy as np
from einops import reduce
from jaxtyping import Float, UInt8

from walt_jax.generation.codec import Codec, TrainedTokenizer
from walt_jax.parallel.processes import fetched, together


@dataclasses.dataclass(frozen=True)
class LowRes:
    """The base stage's tokenizer; a super-resolution stage reads its normalised latents.

    Attributes:
        codec, tokenizer: of the base run.
        scale: how many times smaller the base run's frames are, along height and width.
    """

    codec: Codec
    tokenizer: TrainedTokenizer
    scale: int

    def encode(self, video: UInt8[np.ndarray, "b t h w 3"]) -> Float[np.ndarray, "b t2 h2 w2 c"]:
        """Latents of clips at high resolution, which are shrunk first."""
        return fetched(together(self.codec.encode, self.tokenizer, shrunk(video, self.scale))[0])


def shrunk(video: UInt8[np.ndarray, "*b h w 3"], scale: int) -> UInt8[np.ndarray, "*b h2 w2 3"]:
    """Each square of scale × scale pixels becomes one, their mean."""
    means = reduce(video.astype(np.float32), "... (h r) (w s) c -> ... h w c", "mean", r=scale, s=scale)
    return np.round(means).astype(np.uint8)
