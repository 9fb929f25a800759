"""Samplers and numbers of steps on a trained demo: the judged score of 72 captions, and the time a video takes.

    python benchmarks/sampler_steps.py --workdir=runs/demo --samplers ddim dpm++2m unipc --steps 4 8 16 25 50

Other sampling settings are JSON: `--sampling '{"guidance": {"scale": 1.0}}'`. Prints a line for each sampler and
number of steps and, with `--out`, writes them to a JSON file. Frames are judged as they are decoded, not as compressed
files. Times are those of sampling, without decoding; CPU time is added up over cores, and unlike wall time does not
depend on what else the machine does.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import walt_jax
from walt_jax.config import build
from walt_jax.data.drawn import COMBINATIONS
from walt_jax.evaluation import drawn_score
from walt_jax.generation.latent_diffusion import SamplingConfig
from walt_jax.generation.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--samplers", nargs="+", default=["ddim"])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 16, 25, 50])
    parser.add_argument("--sampling", type=json.loads, default={}, help="knobs of config.sampling, as JSON")
    parser.add_argument("--seeds", type=int, default=1, help="samples a caption")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    generator = walt_jax.load(arguments.workdir).generator
    combinations = [one for one in COMBINATIONS for _ in range(arguments.seeds)]
    seeds = [seed for _ in COMBINATIONS for seed in range(arguments.seeds)]
    requests = [Request(one.caption, seed) for one, seed in zip(combinations, seeds, strict=True)]
    knobs, rows = dataclasses.asdict(generator.config), []
    for sampler in arguments.samplers:
        for steps in arguments.steps:
            changed = {**knobs, **arguments.sampling, "sampler": sampler, "steps": steps}
            if "guidance" in arguments.sampling:
                changed["guidance"] = {**knobs["guidance"], **arguments.sampling["guidance"]}
            config = build(SamplingConfig, changed, "--sampling")
            chosen = dataclasses.replace(generator, config=config)
            chosen.latents(requests[: config.batch_size], bar=False)  # compiles
            start, start_cpu = time.perf_counter(), time.process_time()
            latents = chosen.latents(requests, bar=False)
            seconds = (time.perf_counter() - start) / len(requests)
            cpu_seconds = (time.process_time() - start_cpu) / len(requests)
            clips = chosen.decode(latents)
            _, judged = drawn_score.score(clips, combinations, seeds, [""] * len(clips))
            right = {
                name: sum(one["right"][name] for one in judged) / len(judged)
                for name in ("colour", "shape", "direction")
            }
            everything = sum(all(one["right"].values()) for one in judged) / len(judged)
            row = {"sampler": sampler, "steps": steps, "clips": len(clips), "all_right": everything, **right}
            times = {"seconds_per_video": seconds, "cpu_seconds_per_video": cpu_seconds}
            rows.append({**row, **times, **arguments.sampling})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
