"""How a long video drifts: segments that hand on latents, against segments that decode and encode again.

    python benchmarks/drift.py --workdir=runs/demo --out=docs/generation

Writes `drift.png` (for both ways the last frames of segments 1, 5, 10, 15 and 20), `drift_curves.png` and `drift.json`:
for each segment the sharpness of edges and the distance of the colour from that asked for, and seconds a segment.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import time

import matplotlib
import numpy as np

import walt_jax
from walt_jax.data.drawn import COLOURS, COMBINATIONS
from walt_jax.data.media import contact_sheet
from walt_jax.generation.asking import encoded
from walt_jax.generation.latent_diffusion import NEVER
from walt_jax.generation.long_video import segments
from walt_jax.generation.request import Given, Request

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROMPTS = ("a red circle moving right", "a blue square moving up", "a green triangle moving left")


def latents_handed_on(generator, prompt, seed, count):
    """Frames of each segment."""
    size, stride = generator.longest, generator.model.codec.tokenizer.config.strides[0]
    total = size + (count - 1) * (size - max(2, size // 2))
    video = Request(prompt, seed, size=(1 + (total - 1) * stride, 32, 32))
    return [segment.frames for segment in segments(generator, video)]


def encoded_again(generator, prompt, seed, count):
    """The same, where each segment's first latents are those of the last frames before it, encoded anew."""
    generator = dataclasses.replace(generator, config=dataclasses.replace(generator.config, batch_size=1))
    size, stride = generator.longest, generator.model.codec.tokenizer.config.strides[0]
    kept = max(2, size // 2)  # latent frames
    [frames] = generator.generate([Request(prompt, seed)])
    found = [frames]
    for number in range(1, count):
        last = np.concatenate(found)[-(1 + (kept - 1) * stride) :]
        latents = np.zeros(generator.model.latent_shape, np.float32)
        latents[:kept] = encoded(generator.model.codec, generator.tokenizer, last)
        until = np.full((*latents.shape[:3], 1), NEVER, np.float32)
        until[:kept] = 0
        one = Request(prompt, seed + 1000 * number, given=Given(latents, until))
        found.append(generator.generate([one])[0][len(last) :])
    return found


def sharpness(frames):
    """The mean of the largest tenth of differences between neighbouring pixels, 0..255."""
    differences = np.abs(np.diff(frames.astype(np.float32).max(-1), axis=2)).reshape(len(frames), -1)
    return float(np.sort(differences, axis=1)[:, -differences.shape[1] // 10 :].mean())


def colour_distance(frames, colour):
    """The mean bright pixel's distance from the colour asked for, both as 0..255."""
    values = frames.astype(np.float32)
    bright = values.max(-1) > 0.5 * values.max()
    return float(np.linalg.norm(values[bright].mean(0) - np.array(COLOURS[colour], np.float32)))


def costs(generator, counts=(2, 5, 10, 20, 40), rounds=3):
    """What a second of video costs by the number of segments, and the process's memory after each."""
    latents_handed_on(generator, PROMPTS[0], 0, 2)  # compiles
    found = []
    for count in [count for _ in range(rounds) for count in counts]:
        start, cpu = time.monotonic(), time.process_time()
        frames = sum(map(len, latents_handed_on(generator, PROMPTS[0], 0, count)))
        found.append(
            {
                "segments": count,
                "frames": frames,
                "seconds_per_frame": (time.monotonic() - start) / frames,
                "cpu_seconds_per_frame": (time.process_time() - cpu) / frames,
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--out", default="docs/generation", type=pathlib.Path)
    parser.add_argument("--segments", type=int, default=20)
    parser.add_argument("--costs", action="store_true", help="only what a frame costs, of 2 to 40 segments")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = walt_jax.load(arguments.workdir).generator
    if arguments.costs:
        (arguments.out / "long_video_cost.json").write_text(json.dumps(costs(generator), indent=1) + "\n")
        return
    ways = {"latents handed on": latents_handed_on, "decoded and encoded again": encoded_again}
    rows, strips, titles = [], [], []
    for name, way in ways.items():
        way(generator, PROMPTS[0], 0, 2)  # compiles
        for seed, prompt in enumerate(PROMPTS):
            combination = next(one for one in COMBINATIONS if one.caption == prompt)
            start = time.monotonic()
            found = way(generator, prompt, seed, arguments.segments)
            seconds = time.monotonic() - start
            rows.append(
                {
                    "way": name,
                    "prompt": prompt,
                    "seconds_per_segment": seconds / len(found),
                    "sharpness": [sharpness(frames) for frames in found],
                    "colour_distance": [colour_distance(frames, combination.colour) for frames in found],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            strips.append(np.stack([found[i][-1] for i in range(0, len(found), max(1, len(found) // 7))]))
            titles.append(f"{name}: {prompt}")
    contact_sheet(strips, titles, frames_per_clip=8, columns=1).save(arguments.out / "drift.png")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for axis, key, title in zip(
        axes, ("sharpness", "colour_distance"), ("sharpness of edges", "distance of the colour"), strict=True
    ):
        for name in ways:
            curves = np.array([row[key] for row in rows if row["way"] == name])
            axis.plot(1 + np.arange(curves.shape[1]), curves.mean(0), label=name)
        axis.set(title=title, xlabel="segment")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.out / "drift_curves.png", dpi=80)
    (arguments.out / "drift.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
