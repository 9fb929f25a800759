"""`--mode=data`: which clips training would read, their shapes, how full packs are, and how fast reading is."""

import io
import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import tqdm
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image

from walt_jax.data.clips import StoredClips
from walt_jax.data.frame_groups import frame_groups
from walt_jax.data.media import contact_sheet, stack
from walt_jax.data.packing import Item, fill
from walt_jax.data.pipeline import Clips, Data, Mixture
from walt_jax.data.stream import numbered
from walt_jax.training.data_files import find_short, report_files
from walt_jax.training.pack_batches import WAITING, kept
from walt_jax.training.run_config import RunConfig
from walt_jax.workdir import write_picture

LEAST, MOST = 1024, 4096  # bounds of the number of clips that are read: enough packs, but no hours for large data sets
SHOWN_CLIPS, SHOWN_PACKS = 24, 24


def report_data(config: RunConfig, data: Data, sheet: pathlib.Path) -> dict[str, Any]:
    """Reads the last stage's clips as training would: at least an epoch, within LEAST and MOST clips.

    Args:
        config: see `RunConfig`.
        data: the config's data; with `refuse=False`, problems are reported instead of raised.
        sheet: the PNG to write, with clips, packs and histograms.

    Returns:
        The result of `data_files.report_files` and {"tokens_valid_fraction", "clips_per_second", "frames_per_second",
        "clips_read", "sources", "shapes", "packs", "protocol"}; only the first part if no clip can be read.

    Raises:
        UserError: if there is no such folder.
    """
    name, stage = list(config.stages.items())[-1]
    source = data.source("train", config.clip_shapes(name))
    held_out = data.source("held_out", config.clip_shapes(name))
    if not source.sources:
        return report_files(data, (source, held_out))
    count = min(max(LEAST, len(source)), MOST)
    shown, sizes, timed = [], [], None
    began = time.perf_counter()
    # Texts instead of ids.
    clips = numbered(Clips(source, config.seed + len(config.stages) - 1, encode=list))
    for clip in tqdm.tqdm(itertools.islice(clips, count), "reading clips", count, unit="clip", dynamic_ncols=True):
        sizes.append(clip["video"].shape[:3])
        if len(shown) < min(SHOWN_CLIPS, len(source)):
            shown.append(clip)
        if len(sizes) == min(len(source), count):
            # Only the first epoch is timed: later ones find short clips in the cache.
            timed = {"clips": len(sizes), "frames": sum(size[0] for size in sizes)}
            seconds = time.perf_counter() - began
    find_short([source])
    for index in range(min(len(held_out), MOST)):
        held_out.sample(index, np.random.default_rng(index))
    tokens = [config.tokens(size) for size in sizes]
    packs: list[list[Item]] = []
    if stage.pack is not None:
        if stage.pack.drop is not None:
            tokens = [len(kept(stage.pack.drop, n, max(tokens), [number])) for number, n in enumerate(tokens)]
        if stage.pack.frames:
            tokens = [_in_groups(config, size, stage.pack.frames, number) for number, size in enumerate(sizes)]
        packs = _packs([Item(*item) for item in enumerate(tokens)], stage.pack.tokens, stage.pack.clips)
    used = sum(item.tokens for pack in packs for item in pack)
    labels = [f"{' × '.join(map(str, clip['video'].shape[:3]))}  {clip['text']}" for clip in shown]
    pictures = [contact_sheet([clip["video"] for clip in shown], labels, frames_per_clip=4, columns=3, scale=1)]
    pictures.append(_plots(packs, sizes, stage.pack.tokens if stage.pack else 0, (source, held_out)))
    write_picture(sheet, stack(pictures))
    kinds = {size: sizes.count(size) for size in sorted(set(sizes))}
    return {
        **report_files(data, (source, held_out)),
        "tokens_valid_fraction": used / (len(packs) * stage.pack.tokens) if packs else 1.0,
        "clips_per_second": timed["clips"] / seconds,
        "frames_per_second": timed["frames"] / seconds,
        "clips_read": len(sizes),
        "sources": [
            {
                "source": path,
                "weight": _of(path, data, source)[0],
                "train_clips": _of(path, data, source)[1],
                "held_out_clips": _of(path, data, held_out)[1],
            }
            for path, _ in config.data.parts
        ],
        "shapes": [
            {"frames": size[0], "height": size[1], "width": size[2], "tokens": config.tokens(size), "clips": number}
            for size, number in kinds.items()
        ],
        "packs": {
            "packs": len(packs),
            "tokens_per_pack": stage.pack.tokens if stage.pack else None,
            "clips_per_pack": sum(map(len, packs)) / len(packs) if packs else None,
        },
        "protocol": (
            f"{len(sizes)} clips of stage {name}, in its order, decoded by this process; rates over the first "
            f"{timed['clips']}, each decoded for the first time; packs of a buffer of {WAITING} clips that is full; "
            "without packs every token is a clip's"
        ),
    }


def _in_groups(config: RunConfig, size: tuple[int, int, int], most: int, number: int) -> int:
    """Tokens of a clip's frames that a stage on groups of frames keeps."""
    frames, height, width = config.denoiser.grid(config.tokenizer.latent_shape(*size)[:3])
    return len(frame_groups(frames, most, np.random.default_rng(number)).frames) * height * width


def _packs(waiting: list[Item], tokens: int, clips: int) -> list[list[Item]]:
    """Packs as training makes them, while there are enough waiting clips to choose from."""
    packs = []
    while len(waiting) >= WAITING:
        pack, left = fill(waiting[:WAITING], tokens, clips)
        packs.append(pack)
        waiting = left + waiting[WAITING:]
    return packs


def _of(path: str, data: Data, mixture: Mixture) -> tuple[float, int]:
    """The weight and the number of clips of a source in a mixture; 0 if it is not in it."""
    store = data.stores.get(path)
    for source, weight in zip(mixture.sources, mixture.weights, strict=True):
        if getattr(source, "store", None) is store:
            return weight, len(source)
    return 0.0, 0


def _plots(
    packs: Sequence[Sequence[Item]], sizes: Sequence[tuple[int, int, int]], tokens: int, mixtures: Sequence[Mixture]
) -> Image.Image:
    """Packs as rows with a block for each clip; histograms of the files' lengths, sizes and rates."""
    rows = min(len(packs), SHOWN_PACKS)
    # Two figures: in one, the gap between its rows would grow with the height of the packs.
    figure = Figure(figsize=(12, 2.4 + 0.8), dpi=100)
    pictures = []
    if rows:
        packed = Figure(figsize=(12, 0.25 * rows + 1.0), dpi=100)
        axes = packed.subplots()
        colours = matplotlib.colormaps["tab20"].colors
        for row, pack in enumerate(packs[:rows]):
            left = 0
            for number, item in enumerate(pack):
                axes.barh(row, item.tokens, left=left, color=colours[number % 20], height=0.85)
                if item.tokens > tokens / 14:
                    label = "×".join(map(str, sizes[item.index]))
                    axes.text(left + item.tokens / 2, row, label, ha="center", va="center", fontsize=7)
                left += item.tokens
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set(
            xlim=(0, tokens), ylim=(rows - 0.5, -0.5), xlabel="tokens", ylabel="pack", title="Packs, a block a clip"
        )
        pictures.append(_picture(packed))
    files = [
        info
        for mixture in mixtures
        for source in mixture.sources
        if isinstance(source, StoredClips)
        for info in source.files()
    ]
    for column, (title, values) in enumerate(
        {
            "seconds a file": [info.seconds for info in files],
            "√(height × width), pixels a file": [math.sqrt(info.height * info.width) for info in files],
            "frames a second of a file": [info.fps for info in files],
        }.items()
    ):
        axes = figure.add_subplot(1, 3, column + 1)
        axes.hist(values, bins=30)
        axes.set(xlabel=title, ylabel="files")
    figure.tight_layout()
    return stack([*pictures, _picture(figure)])


def _picture(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight")
    return Image.open(content).convert("RGB")
