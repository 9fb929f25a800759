"""A plan on hardware as a picture: memory by kind, time by part."""

import io
import pathlib
from typing import Any

from matplotlib.figure import Figure

from walt_jax.parallel.roofline import BOUNDS
from walt_jax.training.plan_hardware import duration
from walt_jax.workdir import write_atomically

COLOURS = dict(zip(BOUNDS, ("#4477aa", "#ee6677", "#ccbb44", "#aa3377"), strict=True))
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 7}  # legends, where no bar is
PARTS = 14  # bars; the smallest are summed


def picture(plan: dict[str, Any], path: pathlib.Path) -> None:
    """Draws each program's memory by kind, with the limit, and the train step's time by part, coloured by its bound."""
    entries = plan["programs"]
    figure = Figure(figsize=(12, 6), layout="constrained")
    memory, time = figure.subplots(1, 2, width_ratios=[1, 1.4])
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry["memory_bytes"]))
    names = [entry["name"].replace("_", " ") for entry in entries]
    base = [0.0] * len(entries)
    for number, kind in enumerate(kinds):
        sizes = [entry["memory_bytes"].get(kind, 0) / 2**30 for entry in entries]
        memory.bar(names, sizes, bottom=base, label=kind, color=f"C{number}")
        base = [low + size for low, size in zip(base, sizes, strict=True)]
    memory.axhline(plan["hbm_limit_bytes"] / 2**30, color="black", linestyle="--", label="limit")
    memory.set(ylabel="GiB a device", title=f"{plan['topology']}, {plan['chips']} chips")
    memory.tick_params(axis="x", rotation=20)
    memory.legend(**BELOW, ncols=3)
    main = next(entry for entry in entries if "train" in entry["name"])
    if main["estimated_step_seconds"] is None:
        time.text(0.5, 0.5, "the train step does not fit", ha="center", va="center", transform=time.transAxes)
        time.axis("off")
    else:
        parts = sorted(main["seconds_by_part"].items(), key=lambda part: -sum(part[1].values()))
        shown, others = parts[:PARTS], parts[PARTS:]
        if others:
            summed = {bound: sum(part[bound] for _, part in others) for bound in BOUNDS}
            shown.append((f"{len(others)} smaller parts", summed))
        labels = [name for name, _ in reversed(shown)]
        left = [0.0] * len(shown)
        for bound in BOUNDS:
            widths = [1e3 * part[bound] for _, part in reversed(shown)]
            time.barh(labels, widths, left=left, color=COLOURS[bound], label=f"bound by {bound}")
            left = [start + width for start, width in zip(left, widths, strict=True)]
        seconds, mfu = main["estimated_step_seconds"], main["estimated_mfu"]
        name = main["name"].replace("_", " ")
        time.set(xlabel="ms", title=f"{name}: {duration(seconds)} at least, {mfu:.0%} MFU, {main['clips']} clips")
        time.tick_params(axis="y", labelsize=8)
        time.legend(**BELOW, ncols=2)
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    write_atomically(path, content.getvalue())
