"""Groups of a long clip's frames to train on, with gaps between them (Flexible Diffusion Modeling, Harvey et al. 2022).

A group is some frames at equal distances, near or far. Several together are what a schedule of a long video asks for:
frames here, conditioned on frames there.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class FrameGroups(NamedTuple):
    """Frames of a clip.

    Attributes:
        frames: their numbers, sorted, each once.
        observed: which of them the model is conditioned on; it makes the others, of which there is at least one.
    """

    frames: Int[np.ndarray, " k"]
    observed: Bool[np.ndarray, " k"]


def frame_groups(total: int, most: int, rng: np.random.Generator) -> FrameGroups:
    """At most `most` frames of a clip of `total`: a group that is made, then others, each made or observed by a coin.

    The first group that does not fit is the last one drawn and is left out.
    """
    observed: dict[int, bool] = dict.fromkeys(_group(total, most, rng), False)
    while len(observed) < most:
        seen = bool(rng.integers(2))
        new = [frame for frame in _group(total, most, rng) if frame not in observed]
        if len(new) > most - len(observed):
            break
        observed |= dict.fromkeys(new, seen)
        if len(observed) == total:
            break
    frames = np.array(sorted(observed))
    return FrameGroups(frames, np.array([observed[frame] for frame in frames.tolist()]))


def _group(total: int, most: int, rng: np.random.Generator) -> list[int]:
    """1 to `most` frames at equal distances, of which all orders of magnitude are as likely, anywhere in the clip."""
    count = int(rng.integers(1, min(most, total) + 1))
    distance = (total / (count - 0.999)) ** rng.uniform() if count > 1 else 1.0
    start = rng.uniform(0, total - distance * (count - 1))
    return [min(int(start + number * distance), total - 1) for number in range(count)]
