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
    """Seconds for so many jobs that wait; a first round compiles."""
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
        return time.monotonic() - start


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
        row = {f"together_{key}_seconds": min(values) for key, values in seconds.items()}
        print(json.dumps({"case": name, "jobs": arguments.jobs, **row}), flush=True)


if __name__ == "__main__":
    main()
