"""What a Fréchet or kernel distance depends on besides the network: resizing, and the covariance's divisor."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

Clip = UInt8[np.ndarray, "t h w 3"]
Clips = UInt8[np.ndarray, "n t h w 3"]
Prepared = Float[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class FeatureProtocol:
    """How clips or images get to a network and what its features are compared by.

    Attributes:
        name: the metric's name too, such as `fvd_tf1`.
        network: whose features are compared; "random" and "random_images" are stand-ins with random weights.
        prepare: a clip of any size to the network's size and range of values, frame by frame.
        resize: what `prepare` does, in words.
        ddof: the covariance is divided by n - ddof.
        source: who measures this way.
    """

    name: str
    network: Literal["i3d", "inception", "clip", "c3d", "vjepa", "random", "random_images"]
    prepare: Callable[[Clip], Prepared]
    resize: str
    ddof: int
    source: str

    @property
    def divisor(self) -> str:
        return "N - 1" if self.ddof else "N"

    @property
    def of_images(self) -> bool:
        """Whether each frame is measured alone."""
        return self.network in ("inception", "clip", "random_images")

    def parts(self, clip: Clip) -> Clips:
        """What a clip has features of: itself or, of images, each of its frames as a clip."""
        return clip[:, None] if self.of_images else clip[None]

    def keys(self, key: str, frames: int) -> list[str]:
        """A name for each of a clip's `parts`."""
        return [f"{key}:{frame}" for frame in range(frames)] if self.of_images else [key]

    @property
    def kernel_name(self) -> str:
        """The name of the kernel distance of the same features."""
        for mine, other in (("fvd_", "kvd_"), ("fid_", "kid_"), ("frechet_", "kernel_")):
            if self.name.startswith(mine):
                return other + self.name.removeprefix(mine)
        raise ValueError(f"{self.name} has no kernel distance")
