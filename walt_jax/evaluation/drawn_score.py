"""The score of the demo: the share of samples that show what their prompt says."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from walt_jax.data.drawn import Combination, is_held_out
from walt_jax.evaluation.judge import judge

PROTOCOL = (
    "{count} samples, {each} for each of the {combinations} {split} combinations of colour, shape and direction, with "
    "seeds {first} to {last}; the share of video files in which walt_jax/evaluation/judge.py, which does not see the "
    "prompt, finds {what}"
)


def score(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    combinations: Sequence[Combination],
    seeds: Sequence[int],
    files: Sequence[str],
) -> tuple[list[dict], list[dict]]:
    """Judges samples.

    Args:
        clips: the samples.
        combinations: colour, shape and direction of each sample's prompt.
        seeds: of the samples.
        files: paths of the samples, for the result.

    Returns:
        (metrics, prompts): {"name", "value", "unit", "protocol"} for each share, and for each clip {"prompt",
        "held_out", "file", "seed", "colour", "shape", "direction" as seen, "right": {...}}.
    """
    prompts = []
    for clip, combination, seed, file in zip(clips, combinations, seeds, files, strict=True):
        verdict = judge(clip)
        prompts.append(
            {
                "prompt": combination.caption,
                "held_out": is_held_out(combination),
                "file": file,
                "seed": int(seed),
                "colour": verdict.colour,
                "shape": verdict.shape,
                "direction": verdict.direction,
                "right": verdict.right(combination),
            }
        )
    metrics = []
    for split, held_out, target in (("trained", False, 0.95), ("held_out", True, 0.90)):
        rows = [row for row in prompts if row["held_out"] == held_out]
        distinct = len({row["prompt"] for row in rows})
        for what in ("colour", "shape", "direction", "all"):
            right = [all(row["right"].values()) if what == "all" else row["right"][what] for row in rows]
            metric = {
                "name": f"{split}_{what}_right",
                "value": float(np.mean(right)),
                "unit": "fraction",
                "protocol": PROTOCOL.format(
                    count=len(rows),
                    each=len(rows) // distinct,
                    combinations=distinct,
                    split=split.replace("_", "-"),
                    first=min(seeds),
                    last=max(seeds),
                    what="all three right" if what == "all" else f"the {what} right",
                ),
            }
            metrics.append({**metric, "target": target} if what == "all" else metric)
    return metrics, prompts
