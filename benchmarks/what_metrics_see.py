"""What each metric sees: drawn clips, damaged by known amounts, against other drawn clips. Draws docs/evaluation.png.

    python benchmarks/what_metrics_see.py --out=what_metrics_see --samples=runs/demo/samples

Each set has a clip for each of the 72 captions, 17 frames of 32 × 32. `--samples` adds the first seed of each caption
of a run of configs/walt_demo.py. Takes an hour on two cores; a stopped run resumes.
"""

import argparse
import json
import pathlib

import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.evaluation.evaluate_files import evaluate_files

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FRAMES, SIDE, FPS = 17, 32, 8


def blurred(sigma: float):
    return lambda clip, rng: np.round(gaussian_filter(clip.astype(float), (0, sigma, sigma, 0))).astype(np.uint8)


def shuffled(window: int):
    """Frames in another order within windows."""

    def damage(clip, rng):
        order = [
            i for start in range(0, len(clip), window) for i in start + rng.permutation(len(clip[start:][:window]))
        ]
        return clip[order]

    return damage


def noisy(sigma: float):
    return lambda clip, rng: np.clip(np.round(clip + sigma * rng.normal(size=clip.shape)), 0, 255).astype(np.uint8)


DAMAGE = {
    "none (noise floor)": lambda clip, rng: clip,
    "blur σ 0.5": blurred(0.5),
    "blur σ 1": blurred(1),
    "blur σ 2": blurred(2),
    "noise σ 10": noisy(10),
    "shuffle of 2 frames": shuffled(2),
    "shuffle of 4 frames": shuffled(4),
    "shuffle of all": shuffled(FRAMES),
    "frozen": lambda clip, rng: clip[:1].repeat(FRAMES, 0),
}


def write_set(folder: pathlib.Path, seed: int, damage) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, combination in enumerate(COMBINATIONS):
        path = folder / f"{seed}_{index:02d}.mp4"
        if not path.exists():
            clip = draw(combination, np.random.default_rng([seed, index]), FRAMES, SIDE)
            write_video(path, damage(clip, np.random.default_rng([seed, index, 1])), FPS)


def measured(folder: pathlib.Path, reference: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in evaluate_files(folder, reference, out)["metrics"]}


PANELS = (
    ("fvd_tf1", "FVD (fvd_tf1) ↓"),
    ("kvd_tf1", "KVD ↓"),
    ("lpips_alex", "LPIPS (alex), pairs ↓"),
    ("ssim", "SSIM, pairs ↑"),
    ("roughness", "1 - smoothness ↓"),
    ("dynamic_degree", "dynamic degree"),
)


def shown_clips(folders: dict[str, pathlib.Path]) -> dict[str, np.ndarray]:
    """One clip of each set, of the same caption."""
    return {name: read_clip(sorted(folder.iterdir())[29]) for name, folder in folders.items()}


def picture(rows: dict[str, dict[str, float]], clips: dict[str, np.ndarray], path: pathlib.Path) -> None:
    names = list(rows)
    rows = {name: {**row, "roughness": 1 - row["smoothness"]} for name, row in rows.items()}
    figure, axes = plt.subplots(1, 1 + len(PANELS), figsize=(18, 0.62 * len(names) + 0.8), width_ratios=[2.2, *[1] * 6])
    strip = axes[0]
    strip.axis("off")
    gap = np.full((2, 6 * (SIDE + 2), 3), 255, np.uint8)
    lines = []
    for name in names:
        frames = clips[name][[0, 3, 6, 9, 12, 15]]
        lines += [np.concatenate([np.pad(f, ((0, 0), (0, 2), (0, 0)), constant_values=255) for f in frames], 1), gap]
    strip.imshow(np.concatenate(lines), interpolation="nearest", aspect="auto")
    strip.set_title("frames 0, 3, … 15 of a clip", fontsize=10)
    for line, name in enumerate(names):
        strip.text(-6, (line + 0.5) * (SIDE + 2), name, ha="right", va="center", fontsize=10)
    for axis, (key, title) in zip(axes[1:], PANELS, strict=True):
        values = [rows[name].get(key, np.nan) for name in names]
        axis.barh(range(len(names)), values, color=["#888" if "floor" in name else "#3a6ea5" for name in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks([])
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        top = np.nanmax(values)
        axis.set_xlim(min(0, np.nanmin(values)), 1.45 * top)
        axis.xaxis.set_major_locator(plt.MaxNLocator(3))
        for line, value in enumerate(values):
            text = "" if np.isnan(value) else f"{value:.3g}"
            axis.text(max(value, 0) + 0.03 * top if text else 0, line, text or "–", va="center", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=pathlib.Path, help="samples/ of a run of configs/walt_demo.py")
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("docs/evaluation.png"))
    arguments = parser.parse_args()
    out = arguments.out
    write_set(out / "reference", 1, lambda clip, rng: clip)
    folders = {}
    for number, (name, damage) in enumerate(DAMAGE.items()):
        folders[name] = out / f"clips_{number}"
        write_set(folders[name], 0, damage)
    if arguments.samples:
        folders["the demo's samples"] = out / "samples"
        (out / "samples").mkdir(exist_ok=True)
        for path in sorted(arguments.samples.glob("*seed0.mp4")):
            (out / "samples" / path.name).write_bytes(path.read_bytes())
    rows = {name: measured(folder, out / "reference", out) for name, folder in folders.items()}
    keep = out / "rows.json"
    keep.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    # Damaged clips are also compared with what they were before.
    whole, *damaged = DAMAGE
    for name in damaged:
        pairs = measured(folders[name], folders[whole], out)
        rows[name] |= {key: pairs[key] for key in ("psnr_db", "ssim", "lpips_vgg", "lpips_alex")}
        print(name, {key: float(f"{value:.4g}") for key, value in rows[name].items()}, flush=True)
        keep.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        picture(rows, shown_clips(folders), arguments.picture)
    print(f"wrote {keep} and {arguments.picture}")


if __name__ == "__main__":
    main()
