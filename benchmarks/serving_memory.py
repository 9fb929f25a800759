"""Resident memory of a server over hundreds of random requests: sizes, lengths, steps, guidance, cancels.

python benchmarks/serving_memory.py --workdir=runs/tiny --requests=400
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request


def started(workdir: str, log: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """(process, its address)"""
    command = [sys.executable, "-m", "walt_jax.main", f"--workdir={workdir}", "--mode=serve", "--port=0"]
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=dict(os.environ))
    while not (found := re.search(r"http://\S+", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)
    return process, found[0].rstrip("/")


def called(address: str, method: str = "GET", body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def resident(process: subprocess.Popen) -> float:
    """MiB."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/tiny")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--at_once", type=int, default=12)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--heights", type=numbers, default="2,2,3", help="in the model's units, each equally likely")
    parser.add_argument("--widths", type=numbers, default="2", help="as --heights")
    parser.add_argument("--lengths", type=numbers, default="0,1,1", help="as --heights, after the first frame")
    parser.add_argument("--unguided", type=float, default=0.0, help="fraction of requests without guidance")
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        process, address = started(arguments.workdir, pathlib.Path(folder) / "log")
        try:
            about = called(f"{address}/v1/about")
            time_unit, height_unit, width_unit = about["units"]
            start, waiting, done = time.monotonic(), [], 0
            print(json.dumps({"requests": 0, "resident_mib": round(resident(process))}), flush=True)
            for number in range(1, arguments.requests + 1):
                height = rng.choice(arguments.heights) * height_unit
                width = rng.choice(arguments.widths) * width_unit
                guidance = 1.0 if rng.random() < arguments.unguided else rng.uniform(1.5, 8.0)
                asked = {
                    "prompt": f"a {rng.choice(['red', 'green', 'blue'])} square", "seed": number,
                    "num_frames": 1 + time_unit * rng.choice(arguments.lengths), "height": height, "width": width,
                    "num_inference_steps": rng.randint(1, 12), "guidance_scale": guidance,
                }  # fmt: skip
                if height * width > about["most_pixels"]:
                    asked["height"], asked["width"] = about["height"], about["width"]
                waiting.append(called(f"{address}/v1/videos", "POST", asked)["id"])
                if rng.random() < 0.1:
                    called(f"{address}/v1/videos/{waiting.pop()}", "DELETE")
                while len(waiting) >= (1 if number % arguments.every == 0 else arguments.at_once):
                    job = called(f"{address}/v1/videos/{waiting[0]}")
                    if job["status"] == "failed":
                        raise SystemExit(str(job))
                    if job["status"] == "completed":
                        waiting.pop(0)
                        done += 1
                    else:
                        time.sleep(0.05)
                if number % arguments.every == 0:
                    row = {"requests": number, "videos": done, "resident_mib": round(resident(process))}
                    print(json.dumps({**row, "seconds": round(time.monotonic() - start)}), flush=True)
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    main()
