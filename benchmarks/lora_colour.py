"""Teaches the trained demo a colour that no caption of it has, by LoRA, and measures what it has learned and kept.

    python benchmarks/lora_colour.py draw --out=runs/orange_clips
    python -m walt_jax.main --config=configs/walt_lora.py --config.data.source=runs/orange_clips --workdir=runs/orange
    python benchmarks/lora_colour.py measure --workdir=runs/demo --lora=runs/orange --out=docs/lora

`draw` writes clips of an orange shape, with metadata.csv; three combinations of shape and direction, `UNSEEN`, are left
out. `measure` judges samples of all 12 combinations of orange and of the 72 of the demo, with and
without the LoRA, and writes `lora.json` and `lora.png`.
"""

import argparse
import csv
import hashlib
import json
import pathlib

import jax
import numpy as np

import walt_jax
from walt_jax.data import drawn
from walt_jax.data.drawn import COMBINATIONS, DIRECTIONS, SHAPES, Combination, combinations, draw
from walt_jax.data.media import compare_sheet, write_video
from walt_jax.evaluation.judge import judge
from walt_jax.evaluation.reconstruction import psnr_db
from walt_jax.generation.lora_files import FILE
from walt_jax.generation.request import Request

SIZE, FRAMES, FPS = 32, 17, 8.0
COLOUR, RGB = "orange", (255, 128, 0)
NEW = tuple(Combination(COLOUR, shape, direction) for shape in SHAPES for direction in DIRECTIONS)
UNSEEN = tuple(Combination(COLOUR, *parts) for parts in (("circle", "up"), ("square", "left"), ("triangle", "right")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("draw", "measure"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--clips", type=int, default=6, help="draw: of each new combination")
    parser.add_argument("--old", type=int, default=0, help="draw: of each combination that the demo was trained on")
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--lora", default="runs/orange")
    parser.add_argument("--samples", type=int, default=4, help="measure: of each new combination")
    arguments = parser.parse_args()
    drawn.COLOURS[COLOUR] = RGB  # for the drawing and for the judge, which takes the nearest of these
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "draw":
        write_clips(arguments.out, arguments.clips, arguments.old)
    else:
        measure(arguments.workdir, arguments.lora, arguments.samples, arguments.out)


def write_clips(out: pathlib.Path, new: int, old: int) -> None:
    """Clips of the new combinations that are not `UNSEEN`, and of the old ones that are not held out."""
    rows = []
    counts = {one: new for one in NEW if one not in UNSEEN} | dict.fromkeys(combinations("train"), old)
    for combination, count in counts.items():
        for number in range(count):
            file = f"{combination.caption.replace(' ', '_')}_{number}.mp4"
            seed = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "big")
            write_video(out / file, draw(combination, np.random.default_rng(seed), FRAMES, SIZE), FPS)
            rows.append((file, combination.caption))
    with (out / "metadata.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("file_name", "caption"), *rows])
    print(f"wrote {len(rows)} clips and metadata.csv to {out}")


def measure(workdir: str, lora: str, samples: int, out: pathlib.Path) -> None:
    """Scores with and without the LoRA, and what 8 bits cost."""
    plain, changed = walt_jax.load(workdir).generator, walt_jax.load(workdir, lora=lora).generator
    half = walt_jax.load(workdir, lora=f"{lora}:0.5").generator
    new = {"new": [one for one in NEW if one not in UNSEEN], "new, not drawn": list(UNSEEN)}
    both = new | {"old": list(COMBINATIONS)}
    ways = {
        "without": (plain, both),
        "with the LoRA": (changed, both),
        "with half of it": (half, new),
        "without, int8": (plain.in_int8(), {"old": both["old"]}),
        "with the LoRA, int8": (changed.in_int8(), both),
    }
    rows, clips, latents = [], {}, {}
    for way, (generator, sets) in ways.items():
        for name, members in sets.items():
            each = 1 if name == "old" else samples
            wanted = [one for one in members for _ in range(each)]
            requests = [Request(one.caption, number % each) for number, one in enumerate(wanted)]
            found = generator.latents(requests)
            clips[way, name], latents[way, name] = generator.decode(found), np.stack(found)
            rows.append({"way": way, "combinations": name, "samples": len(wanted)})
            rows[-1] |= judged(clips[way, name], wanted)
            if way.endswith("int8"):
                rows[-1] |= difference(latents, clips, way, name)
            print(json.dumps(rows[-1]), flush=True)
    again = walt_jax.load(workdir).generator.latents([Request(one.caption) for one in COMBINATIONS[:8]])
    found = {
        "bit_equal_without_lora": bool((np.stack(again) == latents["without", "old"][:8]).all()),
        "file_bytes": (pathlib.Path(lora) / FILE).stat().st_size,
        "parameters_bytes": size(plain.params),
        "parameters_bytes_int8": size(plain.in_int8().params),
        "scores": rows,
    }
    (out / "lora.json").write_text(json.dumps(found, indent=1) + "\n")
    shown, sheet = {one.caption for one in (NEW[3], NEW[4], NEW[5], NEW[11], *UNSEEN)}, []
    for way in ("without", "with half of it", "with the LoRA"):
        pairs = [pair for name in new for pair in of(new[name], clips[way, name], samples) if pair[0] in shown]
        sheet.append((f"{way}; of the last three no clip was trained on", pairs[1:]))
    old = of(both["old"], clips["with the LoRA", "old"], 1)
    sheet.append(("with the LoRA: captions of the demo", old[5::12]))
    compare_sheet(sheet, frames_per_clip=5).save(out / "lora.png")


def of(members: list, made: list, samples: int) -> list:
    """(caption, its first clip)"""
    return [(one.caption, clip) for one, clip in zip(members, made[::samples], strict=True)]


def judged(made: list, wanted: list) -> dict:
    """Shares of clips with the right colour, shape and direction, and with all three."""
    right = [judge(clip).right(one) for clip, one in zip(made, wanted, strict=True)]
    found = {f"{name}_right": float(np.mean([one[name] for one in right])) for name in ("colour", "shape", "direction")}
    return found | {"all_right": float(np.mean([all(one.values()) for one in right]))}


def difference(latents: dict, clips: dict, way: str, name: str) -> dict:
    """Of samples with weights of 8 bits from those with float32, of the same noise."""
    before = way.removesuffix(", int8")
    error = latents[way, name] - latents[before, name]
    pairs = zip(clips[before, name], clips[way, name], strict=True)
    return {
        "latents_rms_error": float(np.sqrt(np.square(error).mean())),
        "latents_rms": float(np.sqrt(np.square(latents[before, name]).mean())),
        "psnr_to_float32_db": float(np.mean([psnr_db(clip, other) for clip, other in pairs])),
    }


def size(params: dict) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
