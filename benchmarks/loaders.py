"""Clips out of their files and onto the device: this pipeline, plain PyAV, and PyTorch's DataLoader, in one run.

    pip install -e ".[race]"
    python benchmarks/loaders.py --data=FOLDER --out=loaders.json

All are asked for the same windows of the same files, once a round, interleaved, so that a machine that is slow for a
while is slow for all; the first round is not counted. Each makes clips that cover a square of `--side` pixels and, but
for plain PyAV, crops them at random and puts them into batches.

- `pyav`: decodes and resizes in as many threads as the pipeline. It is the most that can be had of the files.
- `torch, N workers`: a map-style data set as one writes it: open, seek, decode, resize (bilinear, antialiased), crop.
  Its workers stay from round to round.
- `ours`: batches as training reads them, without the cache, put onto JAX's device.
- `ours, cached`: the same with the cache of decoded clips, which the first round fills.

Then it reads on as training does, for `--epochs` times as many clips, and tells how much memory the pipeline has, its
decoding processes included.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from importlib import metadata
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from walt_jax.data.batches import Batches
from walt_jax.data.order import Order
from walt_jax.data.pipeline import Clips, Data, DataConfig
from walt_jax.data.shapes import ClipShape
from walt_jax.data.stream import READ_THREADS
from walt_jax.data.video import RESIZE, covering

SEED = 0
TOKEN = (4, 8, 8)  # frames, rows and columns of pixels a token; the first frame has tokens of its own
PACKAGES = ("torch", "av", "jax", "grain", "numpy")


class Window(NamedTuple):
    """Where a clip is: in a file, from `start` seconds on."""

    path: str
    start: float


def pictures(window: Window, frames: int, fps: float) -> Iterator[av.VideoFrame]:
    """The frames of a window at `fps`; the last one stays where the file ends before it."""
    count, frame = 0, None
    for start in (window.start, 0.0):
        with av.open(window.path) as container:
            if start:
                container.seek(int(start * av.time_base))
            for frame in container.decode(video=0):
                while count < frames and (frame.time or 0.0) >= start + count / fps:
                    yield frame
                    count += 1
                if count == frames:
                    return
        if frame is not None:
            yield from itertools.repeat(frame, frames - count)
            return


class TorchWindows(Dataset):
    """Windows as a PyTorch data set: uint8 [t, 3, side, side]."""

    def __init__(self, windows: list[Window], frames: int, side: int, fps: float):
        self.windows, self.frames, self.side, self.fps = windows, frames, side, fps

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        shown = pictures(self.windows[index], self.frames, self.fps)
        video = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in shown])).permute(0, 3, 1, 2)
        size = covering(*video.shape[2:], (self.side, self.side))
        video = F.interpolate(video, size, mode="bilinear", antialias=True)
        top, left = (int(torch.randint(extent - self.side + 1, ())) for extent in size)
        return video[..., top : top + self.side, left : left + self.side].contiguous()


class Chosen:
    """Some of the clips by their place among them, and nothing after them: what a round has not asked for, no thread
    decodes during the next."""

    def __init__(self, clips: Clips, numbers: list[int]):
        self._clips, self._numbers = clips, numbers

    def __getitem__(self, place: int) -> dict[str, Any] | None:
        return self._clips[self._numbers[place]] if place < len(self._numbers) else None


class Work(NamedTuple):
    """What a round reads.

    Attributes:
        windows: of the files.
        numbers: the same in the pipeline's order.
        shape: of clips.
        fps: their frames a second.
        batch_size: clips a batch, which divides their number.
    """

    windows: list[Window]
    numbers: list[int]
    shape: ClipShape
    fps: float
    batch_size: int


def choose(config: DataConfig, shape: ClipShape, clips: int, batch_size: int) -> Work:
    """The first clips of an epoch, as many as there are batches of them."""
    mixture = Data(config).source("train", (shape,))
    order, reader = Order([len(mixture)], mixture.weights, SEED), Clips(mixture, SEED)
    source = mixture.sources[0]
    windows, numbers = [], []
    for number in range(len(mixture)):
        if len(numbers) < clips and reader[number] is not None:
            file = source.file(order[number].index)
            # The pipeline's own draw, see `StoredClips`.
            last = max(0, source.store.length(file, config.fps) - shape.span)
            start = int(np.random.default_rng([SEED, number]).integers(last + 1))
            windows.append(Window(os.fspath(source.store.content(file)), start / config.fps))
            numbers.append(number)
    count = len(numbers) // batch_size * batch_size
    return Work(windows[:count], numbers[:count], shape, config.fps, batch_size)


def pyav(work: Work) -> Callable[[], int]:
    """A round of plain PyAV."""
    cover = (work.shape.height, work.shape.width)

    def decode(window: Window) -> int:
        count, reformatter = 0, VideoReformatter()  # one a clip, as the pipeline has
        for frame in pictures(window, work.shape.frames, work.fps):
            height, width = covering(frame.height, frame.width, cover)
            reformatter.reformat(frame, width, height, "rgb24", interpolation=RESIZE, threads=1).to_ndarray()
            count += 1
        return count

    def run() -> int:
        with futures.ThreadPoolExecutor(READ_THREADS) as pool:
            return sum(pool.map(decode, work.windows))

    return run


def torch_loader(work: Work, workers: int) -> Callable[[], int]:
    """A round of a DataLoader."""
    windows = TorchWindows(work.windows, work.shape.frames, work.shape.height, work.fps)
    loader = DataLoader(windows, work.batch_size, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(batch.shape[0] * batch.shape[1] for batch in loader)


def ours(work: Work, config: DataConfig) -> Callable[[], int]:
    """A round of the pipeline."""
    clips = Chosen(Clips(Data(config).source("train", (work.shape,)), SEED), work.numbers)

    def run() -> int:
        import jax  # after PyTorch's workers have been forked

        batches = iter(Batches(clips, (work.batch_size,)))
        on_device = []
        for _ in range(len(work.numbers) // work.batch_size):
            on_device.append(jax.device_put(next(batches)["video"]))
        return sum(batch.shape[0] * batch.shape[1] for batch in jax.block_until_ready(on_device))

    return run


class Round(NamedTuple):
    """What a round took: seconds by the clock, and seconds of processors, those of its processes included."""

    seconds: float
    cpu_seconds: float


def race(rivals: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, list[Round]], dict[str, int]]:
    """Each rival's rounds, and how many frames it got in one."""
    taken: dict[str, list[Round]] = {name: [] for name in rivals}
    frames = {}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            cpu, began = cpu_seconds(), time.perf_counter()
            frames[name] = run()
            if number:
                taken[name].append(Round(time.perf_counter() - began, cpu_seconds() - cpu))
    return taken, frames


def stat(process: pathlib.Path) -> list[str]:
    """The fields of a process's status, from its state on; none where it has ended."""
    with contextlib.suppress(OSError):
        return (process / "stat").read_text().rsplit(")", 1)[1].split()
    return []


def children() -> list[pathlib.Path]:
    """This process's children, in /proc."""
    return [path for path in pathlib.Path("/proc").glob("[0-9]*") if stat(path)[1:2] == [str(os.getpid())]]


def cpu_seconds() -> float:
    """What this process and its children have had of the processors so far."""
    used = (stat(process)[11:13] for process in [pathlib.Path("/proc/self"), *children()])
    return sum(int(ticks) for each in used for ticks in each) / os.sysconf("SC_CLK_TCK")


def read_on(work: Work, config: DataConfig, epochs: int) -> Iterator[dict[str, int]]:
    """Reads as training does, one epoch after the other; yields the memory before each of them and at the end."""
    import jax

    batches = iter(Batches(Clips(Data(config).source("train", (work.shape,)), SEED), (work.batch_size,)))
    for epoch in range(epochs + 1):
        yield resident_bytes()
        for _ in range(len(work.numbers) // work.batch_size if epoch < epochs else 0):
            jax.block_until_ready(jax.device_put(next(batches)["video"]))


def resident_bytes() -> dict[str, int]:
    """Of this process, and of the pipeline's decoding processes together."""

    def of(process: pathlib.Path) -> int:
        return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    decoders = [child for child in children() if b"watchdog" in (child / "cmdline").read_bytes()]
    return {"this_process": of(pathlib.Path("/proc/self")), "decoders": sum(map(of, decoders))}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }


def main(arguments: list[str] | None = None) -> None:
    """Races the loaders and writes what was measured; see above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="a folder of videos")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--clips", type=int, default=64, help="at most so many a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=(0, 1, 2), help="of PyTorch's loaders")
    parser.add_argument("--epochs", type=int, default=5, help="of as many clips, to look at memory")
    flags = parser.parse_args(arguments)

    before = machine()
    shape = ClipShape(flags.frames, flags.side, flags.side)
    config = DataConfig(
        flags.data, flags.frames, flags.side, flags.side, fps=flags.fps, cache_bytes=0, max_bad_fraction=0.2
    )
    cached = DataConfig(flags.data, flags.frames, flags.side, flags.side, fps=flags.fps, max_bad_fraction=0.2)
    work = choose(config, shape, flags.clips, flags.batch_size)
    rivals = {f"torch, {workers} workers": torch_loader(work, workers) for workers in flags.workers}
    rivals |= {"pyav": pyav(work), "ours": ours(work, config), "ours, cached": ours(work, cached)}
    taken, frames = race(rivals, flags.rounds)
    resident = list(read_on(work, config, flags.epochs))

    per_clip = (1 + (flags.frames - 1) // TOKEN[0]) * (flags.side // TOKEN[1]) * (flags.side // TOKEN[2])
    rows = []
    for name, rounds in taken.items():
        values = [each.seconds for each in rounds]
        median, clips = statistics.median(values), len(work.windows)
        # Of the same round, so that what slows the machine down slows both.
        ratios = [each.seconds / own.seconds for each, own in zip(rounds, taken["ours"], strict=True)]
        rows.append(
            {
                "name": name,
                "seconds_median": median,
                "seconds_fastest": min(values),
                "seconds_slowest": max(values),
                "clips_per_second": clips / median,
                "frames_per_second": frames[name] / median,
                "tokens_per_second": clips * per_clip / median,
                "cpu_seconds_a_clip": statistics.median(each.cpu_seconds for each in rounds) / clips,
                "ours_over_it": statistics.median(ratios),
                "ours_over_it_least": min(ratios),
                "ours_over_it_most": max(ratios),
            }
        )
    result = {
        "machine": {**before, "load_average_at_the_end": os.getloadavg()[0]},
        "flags": {**vars(flags), "out": str(flags.out)},
        "clips_a_round": len(work.windows),
        "files": len({window.path for window in work.windows}),
        "pixels_a_token": TOKEN,
        "decode_threads": READ_THREADS,
        "rows": rows,
        "resident_bytes_after_epochs": resident,
    }
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"wrote {flags.out}")


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = [
        "| | clips/s | frames/s | tokens/s | CPU seconds a clip | ours over it: median (least to most) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['name']} | {row['clips_per_second']:.2f} | {row['frames_per_second']:.0f} "
            f"| {row['tokens_per_second']:.0f} | {row['cpu_seconds_a_clip']:.3f} | {row['ours_over_it']:.2f} "
            f"({row['ours_over_it_least']:.2f} to {row['ours_over_it_most']:.2f}) |"
            for row in result["rows"]
        ),
    ]
    totals = [sum(entry.values()) / 2**20 for entry in result["resident_bytes_after_epochs"]]
    decoders = result["resident_bytes_after_epochs"][-1]["decoders"] / 2**20
    lines += [
        "",
        f"Memory, MiB, before and after each epoch more: {', '.join(f'{total:.1f}' for total in totals)}; of these at "
        f"the end {decoders:.1f} in decoding processes.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
