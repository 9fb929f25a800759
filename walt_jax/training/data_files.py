"""Reports which files training reads, and which it skips and why: on the console, in `files.json` and `data.json`."""

import re
from collections.abc import Sequence
from typing import Any

from walt_jax.data.clips import StoredClips
from walt_jax.data.pipeline import Data, Mixture

NAMED = 3  # files that are named for each reason


def report_files(data: Data, mixtures: Sequence[Mixture]) -> dict[str, Any]:
    """The state of every file so far.

    Args:
        data: the config's data.
        mixtures: the splits that are read.

    Returns:
        {"clips_kept", "clips_skipped" [{"file", "reason"}], "files_kept" [{"file", "frames", "fps", "height", "width",
        "seconds"}], "training" {"would_train", "problems", "warnings", "files_checked", "files_unreadable",
        "unreadable_fraction", "max_bad_fraction"}}.
    """
    stores, problems = data.stores.values(), data.problems
    checked, unreadable = (sum(getattr(store, name) for store in stores) for name in ("checked", "unreadable"))
    return {
        "clips_kept": sum(
            source.kept if isinstance(source, StoredClips) else len(source)
            for mixture in mixtures
            for source in mixture.sources
        ),
        "clips_skipped": data.skipped,
        "files_kept": [
            {
                "file": str(store.path / file),
                "frames": info.frames,
                "fps": info.fps,
                "height": info.height,
                "width": info.width,
                "seconds": info.seconds,
            }
            for store in stores
            for file, info in store.info.items()
            if file not in store.reasons
        ],
        "training": {
            "would_train": not problems,
            "problems": problems,
            "warnings": [warning for store in stores for warning in store.warnings],
            "files_checked": checked,
            "files_unreadable": unreadable,
            "unreadable_fraction": unreadable / checked if checked else 0.0,
            "max_bad_fraction": data.config.max_bad_fraction,
        },
    }


def find_short(mixtures: Sequence[Mixture]) -> None:
    """See `StoredClips.find_short`."""
    for mixture in mixtures:
        for source in mixture.sources:
            if isinstance(source, StoredClips):
                source.find_short()


def sentences(found: dict[str, Any]) -> list[str]:
    """Lines for the console: warnings, the number of clips kept, and of files skipped for each reason."""
    skipped = found["clips_skipped"]
    lines = [f"warning: {warning}" for warning in found["training"]["warnings"]]
    lines.append(f"{found['clips_kept']:,} clips kept, {len(skipped):,} files skipped")
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in skipped:
        groups.setdefault(re.sub(r"\d+", "N", entry["reason"]), []).append(entry)
    for entries in sorted(groups.values(), key=len, reverse=True):
        names = ", ".join(entry["file"] for entry in entries[:NAMED]) + (", …" if len(entries) > NAMED else "")
        lines.append(f"  {len(entries):,} skipped: {entries[0]['reason']} ({names})")
    return lines


def verdict(found: dict[str, Any]) -> str:
    """A sentence that says whether training would start on these files."""
    training = found["training"]
    if training["problems"]:
        return "training would stop: " + " ".join(training["problems"])
    return (
        f"training would start: {training['files_unreadable']:,} of {training['files_checked']:,} files "
        f"({training['unreadable_fraction']:.1%}) can't be read, and max_bad_fraction allows "
        f"{training['max_bad_fraction']:.1%}"
    )
