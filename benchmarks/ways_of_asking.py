"""Each way of asking on the trained demo, judged by the rules of the drawn clips; a sheet and a table.

    python benchmarks/ways_of_asking.py --workdir=runs/demo --out=docs/generation

Writes `ways.png` and `ways.json`: for each way, the share of clips in which colour, shape and direction are those asked
for, and how well what was given comes back, beside the tokenizer's own error on it.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

import walt_jax
from walt_jax.data.drawn import COLOURS, COMBINATIONS, Combination, draw
from walt_jax.data.media import compare_sheet, write_video
from walt_jax.evaluation.judge import judge
from walt_jax.evaluation.reconstruction import psnr_db
from walt_jax.generation.asking import Ask, Condition, encoded, resolve
from walt_jax.generation.request import Request

SIZE, FRAMES, FPS = 32, 17, 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--out", default="docs/generation", type=pathlib.Path)
    parser.add_argument("--clips", type=int, default=24)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = walt_jax.load(arguments.workdir).generator
    rng = np.random.default_rng(0)
    chosen = [COMBINATIONS[i] for i in rng.choice(len(COMBINATIONS), arguments.clips, replace=False)]
    clips = [draw(one, np.random.default_rng(number), FRAMES, SIZE) for number, one in enumerate(chosen)]
    rows, shown = [], []
    for name, way in WAYS.items():
        start = time.monotonic()
        asked, resolved = [], []
        for clip, one in zip(clips, chosen, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                asked.append(way(pathlib.Path(folder), clip, one))
                resolved.append(resolve(generator, asked[-1][0], (FRAMES, SIZE, SIZE)))
        requests = [
            Request(wanted.caption, number, "", one.size, one.given)
            for number, ((_, wanted, _), one) in enumerate(zip(asked, resolved, strict=True))
        ]
        made = [clip[one.shown] for clip, one in zip(generator.generate(requests, bar=True), resolved, strict=True)]
        row = {"way": name, "clips": len(made)} | judged(made, [wanted for _, wanted, _ in asked])
        comparisons = [compare for *_, compare in asked]
        row |= closing(made) if way is loop else returned(generator, made, comparisons, clips)
        row["seconds"] = time.monotonic() - start
        rows.append(row)
        print(json.dumps(row), flush=True)
        shown.append((name, [(asked[0][1].caption, made[0]), (asked[1][1].caption, made[1])]))
    first = [
        ("given: the first half of these", [(one.caption, clip) for one, clip in zip(chosen[:2], clips, strict=False)])
    ]
    compare_sheet(first + shown, frames_per_clip=9).save(arguments.out / "ways.png")
    (arguments.out / "ways.json").write_text(json.dumps(rows, indent=1) + "\n")


def judged(made: list, wanted: list) -> dict:
    """Shares of clips with the right colour, shape and direction, and with all three."""
    right = [judge(clip).right(one) for clip, one in zip(made, wanted, strict=True)]
    found = {f"{name}_right": float(np.mean([one[name] for one in right])) for name in ("colour", "shape", "direction")}
    return found | {"all_right": float(np.mean([all(one.values()) for one in right]))}


def returned(generator, made: list, comparisons: list, clips: list) -> dict:
    """PSNR of what was given against what came back, and against the tokenizer's reconstruction of the drawn clip."""
    if comparisons[0] is None:
        return {}
    back, own = [], []
    for clip, (index, where, wanted), source in zip(made, comparisons, clips, strict=True):
        back.append(psnr_db(_cut(wanted, where), _cut(clip[index], where)))
        latents = encoded(generator.model.codec, generator.tokenizer, source)
        [decoded] = generator.decode([latents])
        own.append(psnr_db(_cut(source, where), _cut(decoded, where)))
    return {"given_psnr_db": float(np.mean(back)), "tokenizer_psnr_db": float(np.mean(own))}


def closing(made: list) -> dict:
    """How far the first frame is from the last, as a multiple of how far frames are from those before them."""
    clips = [clip.astype(np.float32) for clip in made]
    steps = [np.abs(np.diff(clip, axis=0)).mean() for clip in clips]
    return {
        "closing_step": float(np.mean([np.abs(c[0] - c[-1]).mean() / s for c, s in zip(clips, steps, strict=True)]))
    }


def _cut(clip: np.ndarray, where: slice) -> np.ndarray:
    """Columns of frames; of a single frame a clip of one."""
    return np.ascontiguousarray((clip if clip.ndim == 4 else clip[None])[:, :, where])


# A way gives (what is asked, the combination that the video should show, (frames of the video, columns, what they
# should be) or None).


def text(folder, clip, one):
    return Ask(FPS), one, None


def first_picture(folder, clip, one):
    Image.fromarray(clip[0]).save(folder / "first.png")
    return Ask(FPS, [Condition(str(folder / "first.png"))]), one, (slice(0, 1), slice(None), clip[:1])


def first_and_last(folder, clip, one):
    for name, frame in (("first", 0), ("last", FRAMES - 1)):
        Image.fromarray(clip[frame]).save(folder / f"{name}.png")
    given = [Condition(str(folder / "first.png")), Condition(str(folder / "last.png"), -1)]
    return Ask(FPS, given), one, (slice(FRAMES - 1, FRAMES), slice(None), clip[FRAMES - 1 : FRAMES])


def clip_at_the_end(folder, clip, one):
    write_video(folder / "clip.mp4", clip[5:FRAMES], FPS)
    given = [Condition(str(folder / "clip.mp4"), 5)]
    return Ask(FPS, given), one, (slice(5, FRAMES), slice(None), clip[5:FRAMES])


def between_clips(folder, clip, one):
    write_video(folder / "start.mp4", clip[:5], FPS)
    write_video(folder / "end.mp4", clip[13:17], FPS)
    given = [Condition(str(folder / "start.mp4")), Condition(str(folder / "end.mp4"), -4)]
    return Ask(FPS, given), one, (slice(13, 17), slice(None), clip[13:17])


def forward(folder, clip, one):
    write_video(folder / "clip.mp4", clip[:9], FPS)
    ask = Ask(FPS, [Condition(str(folder / "clip.mp4"))], extend="forward", frames=FRAMES)
    return ask, one, (slice(0, 9), slice(None), clip[:9])


def backward(folder, clip, one):
    write_video(folder / "clip.mp4", clip[9:FRAMES], FPS)
    ask = Ask(FPS, [Condition(str(folder / "clip.mp4"))], extend="backward", frames=FRAMES)
    return ask, one, (slice(9, FRAMES), slice(None), clip[9:FRAMES])


def loop(folder, clip, one):
    """Five frames are given; what moves has to come back, against its caption, so it follows rough frames that do."""
    write_video(folder / "clip.mp4", clip[:5], FPS)
    return Ask(FPS, [Condition(str(folder / "clip.mp4"))], extend="loop", frames=13, motion=0.9), one, None


def inpaint(folder, clip, one):
    write_video(folder / "clip.mp4", clip, FPS)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, SIZE // 2 :] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    ask = Ask(FPS, [Condition(str(folder / "clip.mp4"))], mask=str(folder / "mask.png"))
    return ask, one, (slice(None), slice(0, SIZE // 2), clip)


def outpaint(folder, clip, one):
    write_video(folder / "clip.mp4", clip, FPS)
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[8:24, 8:24] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    ask = Ask(FPS, [Condition(str(folder / "clip.mp4"))], mask=str(folder / "mask.png"))
    return ask, one, None


def edit(folder, clip, one):
    """The same motion in another colour."""
    write_video(folder / "clip.mp4", clip, FPS)
    colours = list(COLOURS)
    other = colours[(colours.index(one.colour) + 1) % len(colours)]
    return Ask(FPS, [Condition(str(folder / "clip.mp4"), 0, 0.5)]), Combination(other, one.shape, one.direction), None


WAYS = {
    "text": text,
    "first picture": first_picture,
    "first and last picture": first_and_last,
    "a clip at frame 5": clip_at_the_end,
    "between two clips": between_clips,
    "extend forward": forward,
    "extend backward": backward,
    "loop of a clip, motion 0.9": loop,
    "inpaint the right half": inpaint,
    "outpaint the middle": outpaint,
    "edit, strength 0.5": edit,
}

if __name__ == "__main__":
    main()
