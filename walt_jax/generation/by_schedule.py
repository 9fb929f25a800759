"""Long videos call by call, as a schedule says which frames come from which, for models trained on frames with gaps.

Latent frames are those of one clip, and the model knows where in it each of a call's frames is. With a causal tokenizer
a frame's latents go on from all frames before it: frames are made in the schedule's order, and decoded in the video's,
each as soon as all before it are there.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from walt_jax.generation.latent_diffusion import NEVER
from walt_jax.generation.request import Given, Request
from walt_jax.generation.schedules import Lengths, Stage, is_adaptive, schedule

# Latents of the frames that requests ask for.
Sample = Callable[[list[Request]], list[Float[np.ndarray, "k h w c"]]]
Shape = tuple[int, int, int, int]


class Made(NamedTuple):
    """What a call has made.

    Attributes:
        stage: which frames, from which.
        latents: of the made frames of each video.
    """

    stage: Stage
    latents: list[Float[np.ndarray, "k h w c"]]


def observed_frames(call: int) -> int:
    """Of the frames of a call, those that it observes where there are as many: half of them, at least 2."""
    return min(max(2, call // 2), call - 1)


def leading(given: Given | None) -> int:
    """How many frames at a video's start are given completely: those that the schedule has to begin with."""
    if given is None:
        return 0
    whole = (given.until == 0).all(axis=(1, 2, 3))
    return len(whole) if whole.all() else int(np.argmin(whole))


def calls(sample: Sample, requests: Sequence[Request], shape: Shape, call: int, name: str) -> Iterator[Made]:
    """Makes videos of one size, call by call. Latents are held only as long as a later call observes them.

    Adaptive schedules choose frames by the distance of their latents (FDM: of a network's features) and hold all.

    Args:
        sample: makes the frames of a call, of all videos.
        requests: of whole videos, with as many given frames at their start; one, if the schedule is adaptive.
        shape: (t, h, w, c) of a video's latents.
        call: latent frames of a call.
        name: of the schedule, see `schedules.schedule`.

    Raises:
        UserError: if there is no such schedule.
    """
    given = leading(requests[0].given)
    held = [{frame: request.given.latents[frame] for frame in range(given)} for request in requests]
    lengths = Lengths(shape[0], given, call, call - observed_frames(call))
    stages, last = schedule(name, lengths, lambda frame: held[0][frame].reshape(-1)), {}
    if not is_adaptive(name):
        stages = list(stages)
        last = {frame: number for number, stage in enumerate(stages) for frame in stage.observed}
    for number, stage in enumerate(stages):
        frames = sorted({*stage.observed, *stage.made})
        asked = []
        for request, own in zip(requests, held, strict=True):
            latents, until = np.zeros((len(frames), *shape[1:]), np.float32), np.zeros((len(frames), *shape[1:3], 1))
            for place, frame in enumerate(frames):
                if frame in stage.observed:
                    latents[place] = own[frame]
                elif request.given is None:
                    until[place] = NEVER
                else:
                    latents[place], until[place] = request.given.latents[frame], request.given.until[frame]
            seed = request.seed if number == 0 else seed_of_call(request.seed, number)
            asked.append(dataclasses.replace(request, seed=seed, given=Given(latents, until), frames=tuple(frames)))
        made = [one[np.searchsorted(frames, stage.made)] for one in sample(asked)]
        for own, latents in zip(held, made, strict=True):
            own |= zip(stage.made, latents, strict=True)
            if not is_adaptive(name):
                for frame in [frame for frame in own if last.get(frame, -1) <= number]:
                    del own[frame]
        yield Made(stage, made)


def whole(
    sample: Sample, requests: Sequence[Request], shape: Shape, call: int, name: str
) -> list[Float[np.ndarray, "t h w c"]]:
    """All latents of videos; arguments as those of `calls`."""
    videos = [np.zeros(shape, np.float32) for _ in requests]
    for video, request in zip(videos, requests, strict=True):
        given = leading(request.given)
        video[:given] = request.given.latents[:given] if given else 0
    for made in calls(sample, requests, shape, call, name):
        for video, latents in zip(videos, made.latents, strict=True):
            video[made.stage.made] = latents
    return videos


def seed_of_call(seed: int, number: int) -> int:
    """A seed of its own for each call after the first."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
