"""Benchmarks decoding by the data pipeline against plain PyAV, on the same files with the same number of threads."""

import contextlib
import dataclasses
import io
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import av
import jax
import numpy as np
from etils import epath

from walt_jax.data.clips import StoredClips
from walt_jax.data.order import Draw, Order
from walt_jax.data.pipeline import Clips, Data, DataConfig
from walt_jax.data.shapes import ClipShape, drawn_order
from walt_jax.data.stream import READ_THREADS, numbered
from walt_jax.data.video import RESIZE

CLIPS, ROUNDS = 64, 3


def benchmark_decoding(
    config: DataConfig, shapes: tuple[ClipShape, ...], seed: int, tokens: Callable[[tuple[int, int, int]], int]
) -> list[dict[str, Any]]:
    """Times the first clips of an epoch, alternately with the pipeline and with PyAV; without the cache.

    PyAV reads the same windows: it seeks to the start of each, decodes the same number of frames at the same rate, and
    resizes them to the same size. It trusts headers and stamps and does not crop; of damaged or short clips it reads
    fewer frames.

    Args:
        config: of data in folders.
        shapes: of clips.
        seed: of the order.
        tokens: the number of tokens of a clip of (frames, height, width).

    Returns:
        Two rows {"name", "seconds_median", "clips_per_second", "frames_per_second", "threads"}. The pipeline's includes
        the transfer to the device, and has "tokens_per_second".
    """
    data = Data(dataclasses.replace(config, cache_bytes=0))
    mixture = data.source("train", shapes)
    sizes = [len(source) for source in mixture.sources]
    order = Order(sizes, mixture.weights, seed)
    count = min(CLIPS, sum(sizes))
    draws = [order[number] for number in range(count)]

    tokens_read = []

    def pipeline() -> int:
        frames = 0
        tokens_read.clear()
        for clip in itertools.islice(numbered(Clips(mixture, seed)), count):
            video = jax.block_until_ready(jax.device_put(clip["video"]))
            frames += len(video)
            tokens_read.append(tokens(video.shape[:3]))
        return frames

    def bare() -> int:
        with futures.ThreadPoolExecutor(READ_THREADS) as pool:
            return sum(pool.map(lambda draw: _bare(mixture.sources[draw.source], draw, config.fps, seed), draws))

    seconds: dict[str, list[float]] = {"decode_pipeline": [], "decode_bare_pyav": []}
    frames = {}
    for number in range(ROUNDS + 1):
        for name, run in zip(seconds, (pipeline, bare), strict=True):
            began = time.perf_counter()
            frames[name] = run()
            if number:  # the first round opens the files and starts processes
                seconds[name].append(time.perf_counter() - began)
    rows = [
        {
            "name": name,
            "seconds_median": statistics.median(values),
            "clips_per_second": count / statistics.median(values),
            "frames_per_second": frames[name] / statistics.median(values),
            "threads": READ_THREADS,
        }
        for name, values in seconds.items()
    ]
    rows[0]["tokens_per_second"] = sum(tokens_read) / rows[0]["seconds_median"]
    return rows


def _bare(source: StoredClips, draw: Draw, fps: float, seed: int) -> int:
    """Decodes a clip with plain PyAV; returns the number of frames."""
    rng = np.random.default_rng([seed, draw.number])
    shape = source.shapes[drawn_order(source.shapes, rng)[0]]
    file, frames = source.file(draw.index), 0
    start = int(rng.integers(max(0, source.store.length(file, fps) - shape.span) + 1))
    content = source.store.content(file)
    opened = io.BytesIO(content) if isinstance(content, bytes) else epath.Path(content).open("rb")
    with opened, contextlib.suppress(av.FFmpegError), av.open(opened) as container:
        if start:
            container.seek(int(start / fps * av.time_base))
        for frame in container.decode(video=0):
            # For each tick of `fps`, the picture that is shown then.
            while frames < shape.span and (frame.time or 0) * fps >= start + frames:
                if frames % shape.stride == 0:
                    height, width = shape.size(frame.height, frame.width)
                    frame.reformat(width, height, "rgb24", interpolation=RESIZE, threads=1).to_ndarray()
                frames += 1
            if frames == shape.span:
                break
    return -(-frames // shape.stride)
