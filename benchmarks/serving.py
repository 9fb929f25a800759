"""Throughput of the server's worker: requests made together against one at a time, in one run.

python benchmarks/serving.py --workdir=runs/demo
"""

import argparse
import contextlib
import json
import pathlib
import tempfile
import time

import walt_jax
from walt_jax.serving.fields import Limits
from walt_jax.serving.jobs import Jobs, new
from walt_jax.serving.worker import Worker

CASES = {"one size": ["32x32"], "three sizes": ["32x32", "32x48", "48x32"]}


def measured(model, together, sizes, count, seed):
    """(seconds for so many jobs that wait, of which sampling, of which decoding); a first round compiles."""
    data = model.config.data
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(pathlib.Path(folder))
        pixels = data.frames, data.height, data.width
        worker = Worker(jobs, model.generator, pixels, contextlib.nullcontext, Limits(), together, {})
        for number in range(count):
            name, _ = jobs.new_folder()
            width, height = map(int, sizes[number % len(sizes)].split("x"))
            asked = {
                "prompt": "a blue square moving up", "negative_prompt": "", "seed": seed + number, "steps": 25,
                "guidance": 2.0, "fps": data.fps, "num_frames": data.frames, "height": height, "width": width,
                "extend": None, "strength": 1.0, "files": {},
            }  # fmt: skip
            jobs.add(new(name, asked, name))
        start = time.monotonic()
        while jobs.waiting():
            worker.make_some()
        seconds = time.monotonic() - start
        return seconds, worker.counts["sampling_seconds"], worker.counts["decoding_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--jobs", type=int, default=24)
    arguments = parser.parse_args()
    model = walt_jax.load(arguments.workdir)
    for name, sizes in CASES.items():
        seconds = {}
        for turn in range(3):
            for together in (1, 4, 8):
                found = measured(model, together, sizes, arguments.jobs, 1000 * turn)
                if turn:  # the first round compiles
                    seconds.setdefault(together, []).append(found)
        for together, found in seconds.items():
            total, sampling, decoding = min(found)
            row = {"case": name, "jobs": arguments.jobs, "together": together, "seconds": round(total, 2)}
            row |= {"sampling_seconds": round(sampling, 2), "decoding_seconds": round(decoding, 2)}
            print(json.dumps({**row, "videos_per_second": round(arguments.jobs / total, 2)}), flush=True)


if __name__ == "__main__":
    main()
