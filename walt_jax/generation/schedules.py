"""Which frames of a long video are made when, and from which (Flexible Diffusion Modeling, Harvey et al. 2022).

A schedule is a list of stages. Each observes some frames that are there and makes others; frames are any the model has,
of a causal tokenizer its latent frames. Names are those that the authors' code has.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from walt_jax.errors import UserError

AUTOREG = "autoreg"
MOST_LEVELS = 9  # of a hierarchy; each level halves distances at least, so that more are of no use

# The distance of two frames, by their numbers, of which both are there.
Embed = Callable[[int], Float[np.ndarray, " d"]]


class Stage(NamedTuple):
    """A call of the model.

    Attributes:
        observed: frames that it is conditioned on; one may be named twice.
        made: frames that it makes.
    """

    observed: list[int]
    made: list[int]


class Lengths(NamedTuple):
    """What a schedule is made for.

    Attributes:
        frames: of the video, T.
        given: frames that are there at first, 0 … given − 1; o.
        call: frames of a call of the model, K.
        step: frames that a call makes, s; the others, K − s, are observed.
    """

    frames: int
    given: int
    call: int
    step: int


def schedule(name: str, lengths: Lengths, embed: Embed | None = None) -> Iterator[Stage]:
    """The stages of "autoreg", "long-range", "hierarchy-L", "adaptive-autoreg" or "adaptive-hierarchy-L".

    Without given frames the first stage makes as many as a call has, at the start, or over all of the video in
    hierarchies; these then count as given.

    Args:
        name: of the schedule.
        lengths: see `Lengths`.
        embed: of a frame that is there, for adaptive schedules, which ask for it when a stage begins.

    Raises:
        UserError: if the name is none of these, or the lengths can't be.
    """
    total, given, call, step = lengths
    levels = check_name(name)
    if not 0 < step < call or not 0 <= given <= total:
        raise UserError(
            f"A schedule of {total} frames, {given} given, {call} a call and {step} made in one can't be; a call makes "
            "fewer frames than it has, and no more are given than there are."
        )
    if is_adaptive(name) and embed is None:
        raise ValueError("adaptive schedules need embeddings of frames")
    done = list(range(given))
    if not given:
        spread = np.linspace(0, total - 1, min(call, total)).astype(int)
        first = sorted(set(spread.tolist())) if levels else list(range(min(call, total)))
        yield Stage([], first)
        done = list(first)
    originals = list(done)
    if levels:
        yield from _hierarchy(lengths, levels, done, originals, embed if is_adaptive(name) else None)
        return
    while len(done) < total:
        start, room = done[-1] + 1, call - step
        if name == AUTOREG:
            observed = done[-room:]
        elif name == "long-range":
            near = done[-(room // 2) :] if room // 2 else []
            far = [frame for frame in originals if frame not in near]
            observed = sorted([*far[len(far) - min(len(far), room - len(near)) :], *near])
        else:
            observed = sorted(_farthest(done[-1:], done[:-1], room - 1, embed))
        made = list(range(start, min(start + step, total)))
        yield Stage(observed, made)
        done += made


def is_adaptive(name: str) -> bool:
    """Whether a schedule chooses what is observed by what was made."""
    return name.startswith("adaptive-")


def check_name(name: str) -> int:
    """The levels of a hierarchy, 0 for other schedules.

    Raises:
        UserError: if there is no schedule of that name.
    """
    known = (AUTOREG, "long-range", "adaptive-autoreg")
    kind, _, level = name.removeprefix("adaptive-").partition("-")
    if name in known:
        return 0
    if kind == "hierarchy" and level.isdecimal() and 2 <= int(level) <= MOST_LEVELS:
        return int(level)
    raise UserError(
        f"{name!r} is no schedule; there are {', '.join(known)}, hierarchy-2 to -{MOST_LEVELS} and "
        f"adaptive-hierarchy-2 to -{MOST_LEVELS}."
    )


def _hierarchy(
    lengths: Lengths, levels: int, done: list[int], originals: list[int], embed: Embed | None
) -> Iterator[Stage]:
    total, given, call, step = lengths
    room = call - step
    if given:
        made = sorted(set(np.linspace(given, total - 0.001, step).astype(int).tolist()))
        seen = np.linspace(0, len(originals) - 1, room).astype(int)
        yield Stage([originals[index] for index in seen], made)
        done += made
    for level in range(2, levels + 1):
        stride = max(1, int(((total - given) / max(1, step - 1)) ** ((levels - level) / (levels - 1))))
        there = set(done)
        undone = [frame for frame in range(total) if frame not in there]
        if not undone:
            return
        place = undone[0] - 1 + stride
        while True:
            made = _next(place, stride, step, there, total)
            if not made:
                break
            between = [frame for frame in sorted(there) if made[0] < frame < made[-1]]
            count = room
            if room - len(between) < 2 and step > 1:
                made, count = made[: step - 1], room + 1
                between = [frame for frame in sorted(there) if made[0] < frame < made[-1]]
            yield Stage(_around(made, between, sorted(there), count, embed), made)
            there.update(made)
            place = made[-1] + stride
        done[:] = sorted(there)


def _next(place: int, stride: int, count: int, there: set[int], total: int) -> list[int]:
    """The next frames to make: `stride` apart, past those that are there."""
    found: list[int] = []
    while len(found) < count:
        while place in there:
            place += 1
        if place >= total:
            break
        found.append(place)
        place += stride
    return found


def _around(made: list[int], between: list[int], there: list[int], count: int, embed: Embed | None) -> list[int]:
    """Observed frames: those between, half of the others after them, the rest before."""
    before = [frame for frame in there if frame < made[0]]
    after = [frame for frame in there if frame > made[-1]]
    if embed is not None:
        first = [*before[-2:], *after[:1]][:count]
        return sorted(_farthest(first, [frame for frame in there if frame not in first], count - len(first), embed))
    left = max(0, count - len(between))
    later = after[: left // 2]
    return [*before[len(before) - min(len(before), left - len(later)) :], *between[:count], *later]


def _farthest(chosen: Sequence[int], others: Sequence[int], count: int, embed: Embed) -> list[int]:
    """Adds the frames that are, one after the other, farthest from the nearest chosen one."""
    chosen, others = list(chosen), list(others)
    for _ in range(min(count, len(others))):
        distances = [min(np.linalg.norm(embed(other) - embed(one)) for one in chosen) for other in others]
        chosen.append(others.pop(int(np.argmax(distances))))
    return chosen


def picture(stages: Sequence[Stage], frames: int, cell: int = 12) -> Image.Image:
    """Frames from left to right, stages from top to bottom: blue is observed, orange made, grey there before."""
    colours = {"empty": "#f2f2f2", "there": "#c9c9c9", "observed": "#3b6fb6", "made": "#e08214"}
    image = Image.new("RGB", (frames * cell + 1, len(stages) * cell + 1), "white")
    draw = ImageDraw.Draw(image)
    first = stages[0].observed if stages else []
    there = set(range(max(first, default=-1) + 1))
    for row, stage in enumerate(stages):
        for frame in range(frames):
            name = "there" if frame in there else "empty"
            name = "observed" if frame in stage.observed else "made" if frame in stage.made else name
            corner = frame * cell, row * cell
            draw.rectangle([*corner, corner[0] + cell, corner[1] + cell], colours[name], "white")
        there.update(itertools.chain(stage.observed, stage.made))
    return image
